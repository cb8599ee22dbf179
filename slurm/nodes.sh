# Asks Slurm what the cluster's nodes have. submit.sh sources it to choose sizes and to refuse jobs that would never
# start.

# nodes_in PARTITION: prints a line "CPUS MEGABYTES GPUS NODES" for each kind of node, whatever its state, the largest
# first. With BATCHJOB_GPU_TYPE only GPUs of that type count. Prints nothing if Slurm does not say.
nodes_in() {
  sinfo -h -e ${1:+-p "$1"} -o '%P|%c|%m|%G|%D' 2>/dev/null | awk -F'|' -v named="$1" -v type="$BATCHJOB_GPU_TYPE" '
    named == "" && $1 !~ /\*$/ { next } # the default partition has a star
    {
      gpus = 0
      count = split($4, kinds, ",")
      for (i = 1; i <= count; i++) {
        sub(/\(.*/, "", kinds[i])
        parts = split(kinds[i], part, ":")
        if (part[1] == "gpu" && (type == "" || parts == 2 || tolower(part[2]) == tolower(type))) gpus += part[parts]
      }
      print $2 + 0, $3 + 0, gpus, $5 + 0
    }' | sort -k3,3nr -k1,1nr -k2,2nr
}

# room PARTITION NODES GPUS: prints the "CPUS MEGABYTES" that each of so many nodes with so many GPUs has at least.
# Prints nothing if there are fewer such nodes.
room() {
  nodes_in "$1" | awk -v wanted="$2" -v gpus="$3" '
    $3 >= gpus { found += $4; cpus = (!cpus || $1 < cpus) ? $1 : cpus; memory = (!memory || $2 < memory) ? $2 : memory }
    found >= wanted { print cpus, memory; exit }'
}

# minutes TIME: prints the minutes of Slurm's D-HH:MM:SS, HH:MM:SS, MM:SS, MM, D-HH and D-HH:MM. Prints nothing for
# infinite, or for what is not a time.
minutes() {
  local days=0 clock=$1 a b c
  [[ $clock =~ ^([0-9]+-)?[0-9]+(:[0-9]+)?(:[0-9]+)?$ ]] || return 0
  case $clock in *-*) days=${clock%%-*} clock=${clock#*-} ;; esac
  IFS=: read -r a b c <<<"$clock"
  if [ "$clock" != "$1" ] || [ -n "$c" ]; then echo $((10#$days * 1440 + 10#$a * 60 + 10#${b:-0}))
  else echo $((10#$a)); fi
}

# longest PARTITION: prints the time limit of a partition as Slurm writes it, or nothing if there is no limit.
longest() {
  sinfo -h ${1:+-p "$1"} -o '%P|%l' 2>/dev/null | awk -F'|' -v named="$1" '(named != "" || $1 ~ /\*$/) && $2 != "infinite" { print $2; exit }'
}

# megabytes SIZE: prints the megabytes of Slurm's 32G, 3000M, 32 (megabytes).
megabytes() {
  local number=${1%%[!0-9]*}
  case ${1##*[0-9]} in
    [kK]*) echo $((number / 1024)) ;;
    [gG]*) echo $((number * 1024)) ;;
    [tT]*) echo $((number * 1024 * 1024)) ;;
    *) echo "$number" ;;
  esac
}

least() { [ "$1" -lt "$2" ] && echo "$1" || echo "$2"; }

# fit_time ASKED PARTITION NAME: prints the time limit of a job. Fails if the partition would never let the job start.
fit_time() {
  local limit
  limit=$(longest "$2")
  if [ -z "$1" ]; then
    if [ -n "$limit" ] && [ "$(minutes "$limit")" -lt 1440 ]; then echo "$limit"; else echo 24:00:00; fi
    return
  fi
  if [ -n "$limit" ] && [ -n "$(minutes "$1")" ] && [ "$(minutes "$1")" -gt "$(minutes "$limit")" ]; then
    fail "$3=$1 is longer than partition ${2:-(the default)} allows ($limit), so the job would wait for ever; make it" \
      "shorter, or choose another partition in slurm/site.sh"
  fi
  echo "$1"
}

# fit_size PARTITION NODES TASKS GPUS CPUS MEMORY PREFIX [SUFFIX]: prints "CPUS MEGABYTES" of a task: those asked for
# or, where empty, what the nodes allow. PREFIX and SUFFIX make the names of site.sh's variables. Fails if there are no
# such nodes, since the job would never start.
fit_size() {
  local partition=$1 nodes=$2 tasks=$3 gpus=$4 cpus=$5 memory=$6 have where found
  where="partition ${partition:-(the default)}"
  found=$(nodes_in "$partition" | awk '{ printf "%s%d with %d CPUs, %d MB, %d GPUs", sep, $4, $1, $2, $3; sep = "; " }')
  have=$(room "$partition" "$nodes" "$gpus")
  if [ -z "$have" ]; then
    [ -z "$found" ] || fail "$nodes nodes${gpus:+ of $gpus GPUs each} were asked for, $where has $found;" \
      "change NODES or GPUS, or BATCHJOB_PARTITION${BATCHJOB_GPU_TYPE:+ or BATCHJOB_GPU_TYPE=$BATCHJOB_GPU_TYPE} in slurm/site.sh"
    have="$((tasks * 8)) $((tasks * 36000))" # Slurm does not say what the nodes have: sbatch decides
  fi
  local node_cpus=${have% *} node_memory=${have#* }
  : "${cpus:=$(least 8 $((node_cpus / tasks > 0 ? node_cpus / tasks : 1)))}"
  case $memory in
    '') memory=$(least 32768 $((node_memory * 9 / 10 / tasks))) ;; # the system needs some itself
    *) memory=$(megabytes "$memory") ;;
  esac
  if [ $((cpus * tasks)) -gt "$node_cpus" ] || [ $((memory * tasks)) -gt "$node_memory" ]; then
    fail "$tasks tasks of $cpus CPUs and $memory MB a node were asked for, $where has $found: the job would never start;" \
      "change ${7}CPUS${8:-} or ${7}MEM${8:-} in slurm/site.sh, or ask for fewer tasks a node"
  fi
  echo "$cpus $memory"
}
