#!/usr/bin/env bash
# A real Slurm on this one machine, for the tests: two nodes of four processors and two pretended GPUs each.
#   slurm_cluster.sh install      Debian's packages (root); nothing is started by them
#   slurm_cluster.sh up FOLDER    starts munged, mariadbd, slurmdbd, slurmctld and two slurmd; prints nothing but errors
#   slurm_cluster.sh start FOLDER slurmctld|node1|node2     starts one of them again
#   slurm_cluster.sh down FOLDER  stops what was started, by the process ids that were written down, and takes its names
#                                 out of /etc/hosts
# Clients need SLURM_CONF=FOLDER/slurm.conf. Partitions: batch (is preempted and requeued), urgent (preempts), short (has
# a limit of an hour). Accounts are enforced: root's is `lab`, with the QOS normal and `single` (one job at a time).
# Finished jobs stay known to `scontrol show job` for a day.
set -euo pipefail
verb=$1
folder=${2:-}
nodes=(node1 node2)
port=${SLURM_TEST_PORT:-27100}
hosts_mark='# of slurm_cluster.sh:'

fail() { echo "slurm_cluster: $*" >&2; exit 1; }

# a zombie has an id but no program: nobody may be there to wait for a daemon that was killed
alive() { [ -s "$folder/$1.pid" ] && [ -e "/proc/$(cat "$folder/$1.pid")/exe" ]; }

# in the foreground of a session of its own, so that the id we write down is the daemon's
daemon() {
  local name=$1
  shift
  alive "$name" && return 0
  setsid "$@" >>"$folder/$name.out" 2>&1 </dev/null &
  echo $! >"$folder/$name.pid"
}

wait_for() {
  local what=$1
  shift
  local until=$((SECONDS + 300))
  while [ "$SECONDS" -lt "$until" ]; do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done
  tail -n 5 "$folder"/*.out "$folder"/*.log >&2 || true
  fail "$what did not come up"
}

start() {
  case $1 in
    mariadbd)
      # its data are lost with the folder, so none of it needs to reach the disk
      daemon mariadbd mariadbd --no-defaults --user=root --datadir="$folder/mariadb" --socket="$folder/mariadb.sock" \
        --bind-address=127.0.0.1 --port=$((port + 4)) --skip-name-resolve --skip-grant-tables \
        --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 \
        --skip-innodb-doublewrite --skip-performance-schema
      wait_for mariadbd mariadb --no-defaults --socket="$folder/mariadb.sock" -e 'CREATE DATABASE IF NOT EXISTS slurm' ;;
    slurmdbd)
      daemon slurmdbd env SLURM_CONF="$folder/slurm.conf" slurmdbd -D
      wait_for slurmdbd sacctmgr --noheader list cluster ;;
    slurmctld)
      daemon slurmctld slurmctld -D -f "$folder/slurm.conf"
      wait_for slurmctld sh -c 'scontrol ping | grep -q "is UP"' ;;
    node*) daemon "$1" slurmd -D -f "$folder/slurm.conf" -N "$1" ;;
    *) fail "unknown daemon $1; known: mariadbd, slurmdbd, slurmctld, ${nodes[*]}" ;;
  esac
}

nodes_are_idle() {
  # a node that was down when the last cluster stopped comes back only on request
  sinfo -h -N -p batch -o '%N %t' | awk '$2 ~ /down|drain/ {print $1}' | while read -r n; do
    scontrol update nodename="$n" state=resume || true
  done
  [ "$(sinfo -h -N -p batch -o '%t' | grep -cx idle)" = "${#nodes[@]}" ]
}

# Every cluster of this machine writes lines of its own, so that the first to go takes nobody's names away.
names_into_hosts() {
  local n
  {
    flock 9
    for n in "${nodes[@]}" "$1"; do
      grep -v "$hosts_mark" /etc/hosts | grep -qw -- "$n" || echo "127.0.0.1 $n $hosts_mark $folder" >&9
    done
  } 9>>/etc/hosts
}

names_out_of_hosts() {
  local kept
  {
    flock 9
    kept=$(grep -vxF -- "$(grep -F "$hosts_mark $folder" /etc/hosts)" /etc/hosts || true)
    printf '%s\n' "$kept" >/etc/hosts # in place: in a container the file is mounted, and can't be replaced
  } 9>>/etc/hosts
}

configure() {
  local host g
  host=$(hostname -s)
  names_into_hosts "$host"
  for g in 0 1; do
    [ -e "$folder/gpu$g" ] || mknod -m 666 "$folder/gpu$g" c 1 3
  done
  [ -e "$folder/munge.key" ] || dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 status=none
  chown munge: "$folder/munge.key"
  chmod 400 "$folder/munge.key"
  printf 'NodeName=node[1-2] Name=gpu Type=fake File=%s\n' "$folder/gpu[0-1]" >"$folder/gres.conf"
  cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.sock
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.own.pid
SlurmdPidFile=$folder/%n.own.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
# a container has no cgroups to give away
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 5))
AccountingStoragePass=$folder/munge.sock
AccountingStorageEnforce=associations,limits,qos
JobCompType=jobcomp/none
PropagateResourceLimits=NONE
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1500
# more processors and memory than this machine has: believe this file
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=1,sched_min_interval=0,bf_interval=1,preempt_youngest_first
PriorityType=priority/basic
KillWait=10
MinJobAge=86400
InactiveLimit=0
SlurmctldTimeout=30
# long, since a busy machine may let a daemon wait for many seconds
SlurmdTimeout=60
MessageTimeout=60
BatchStartTimeout=120
UnkillableStepTimeout=300
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=node[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 2))-$((port + 3))] CPUs=4 RealMemory=12000 Gres=gpu:fake:2 State=UNKNOWN
PartitionName=batch Nodes=node[1-2] Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=10 GraceTime=10 PreemptMode=REQUEUE
PartitionName=short Nodes=node[1-2] MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=REQUEUE
PartitionName=urgent Nodes=node[1-2] MaxTime=INFINITE DefaultTime=10 PriorityTier=100 PreemptMode=OFF
CONF
  (umask 077 && cat >"$folder/slurmdbd.conf") <<CONF
AuthType=auth/munge
AuthInfo=socket=$folder/munge.sock
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 5))
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + 4))
StorageUser=root
StorageLoc=slurm
LogFile=$folder/slurmdbd.log
PidFile=$folder/slurmdbd.own.pid
CONF
}

accounts() {
  local manage=(sacctmgr --immediate --quiet)
  "${manage[@]}" add cluster test
  "${manage[@]}" add qos single set MaxJobsPerUser=1 MaxSubmitJobsPerUser=1
  "${manage[@]}" add account lab
  "${manage[@]}" add user root account=lab qos=normal,single
  "${manage[@]}" modify user root set defaultaccount=lab
}

up() {
  [ "$(id -u)" = 0 ] || fail "needs root"
  mkdir -p "$folder/state" "$folder/spool/node1" "$folder/spool/node2"
  chmod 755 "$folder"
  folder=$(realpath "$folder")
  export SLURM_CONF=$folder/slurm.conf
  configure
  # munged wants its files to be its own; --force: the folder above may be anyone's
  touch "$folder/munged.seed"
  chown munge: "$folder/munged.seed"
  daemon munged munged --foreground --force --num-threads 2 --key-file="$folder/munge.key" \
    --socket="$folder/munge.sock" --pid-file="$folder/munged.own.pid" --seed-file="$folder/munged.seed" \
    --log-file="$folder/munged.log"
  wait_for munged munge -n --socket="$folder/munge.sock"
  if [ ! -d "$folder/mariadb/mysql" ]; then
    mariadb-install-db --no-defaults --user=root --datadir="$folder/mariadb" --skip-test-db \
      --auth-root-authentication-method=normal >"$folder/mariadb-install.out" 2>&1 || fail "no database: see $folder"
  fi
  start mariadbd
  start slurmdbd
  accounts >"$folder/accounts.out" 2>&1 || fail "no accounts: $(cat "$folder/accounts.out")"
  start slurmctld
  for n in "${nodes[@]}"; do start "$n"; done
  wait_for "every node" nodes_are_idle
}

down() {
  local name pid
  export SLURM_CONF=$folder/slurm.conf
  timeout 10 scancel --user=root 2>/dev/null || true
  for name in node1 node2 slurmctld slurmdbd mariadbd munged; do
    alive "$name" || continue
    pid=$(cat "$folder/$name.pid")
    case $name in
      slurmdbd | mariadbd) kill -9 "$pid" ;; # they take ten seconds over data that nobody will read
      *) kill "$pid" ;;
    esac
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
    rm -f "$folder/$name.pid"
  done
  names_out_of_hosts
}

case $verb in
  install)
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends slurmctld slurmd slurmdbd slurm-client munge mariadb-server ;;
  up) up ;;
  start) export SLURM_CONF=$folder/slurm.conf; start "$3" ;;
  down) down ;;
  *) fail "unknown verb $verb; known: install, up, start, down" ;;
esac
