"""What can be wrong with DATA and the options by itself, found quickly, before they are compared with a plan."""

import os
from contextlib import suppress
from pathlib import Path

from batchjob import plan as plans
from batchjob.codebook import rows as sample_rows
from batchjob.config import K_RULES, Options
from batchjob.data import sources
from batchjob.errors import UserError, nearest
from batchjob.model import choices, names, weights
from batchjob.plan import ModelSpec, Plan


def check_input(data: str, run: Path, options: Options) -> Plan | None:
    """Checks quickly all that can be wrong with DATA and the options by itself, and then that RUN was planned so.

    Takes a tenth of a second. Only the numbers of another model, stage or image size than RUN's need torch's import.

    Parameters
    ----------
    data
        DATA as the user gave it.
    run
        The folder of the run, which need not be there.
    options
        The result options.

    Returns
    -------
    The plan of RUN; None where RUN has no plan, or a damaged one.

    Raises
    ------
    UserError
        DATA or a file is not there, a name is unknown, the model has no such layer, or the plan that is there differs.
    """
    plan = None
    if (run / "plan.json").exists():
        with suppress(plans.DamagedPlan):
            plan = plans.load(run, checks_index=False)
    if plan is not None and options == plan.options and os.path.abspath(data) == plan.data:
        return plan
    _check_alone(data, options)
    if plan is not None:
        _check_numbers(options, plan)
        plans.check_same(plan, run, data, options)
    return plan


def _check_alone(data: str, options: Options) -> None:
    """Raises UserError where DATA, a split or a file is not there, or a name or a number can't be meant."""
    sources.raise_for_missing(data)
    sources.raise_for_absent_list(data)
    sources.raise_for_split(data, options.split)
    names.raise_for_unknown(options.model)
    plans.choose_rows_per_partition(options.rows_per_partition, 1, is_for_gpu=False)
    if not options.k.lstrip("+-").isdigit() and options.k not in K_RULES and not Path(options.k).is_file():
        raise UserError(
            f"--k {options.k!r} is not a number, a rule or a file that is there; "
            f"{nearest(options.k, list(K_RULES))}, a number, or a CSV of image_id,k"
        )
    if options.weights:
        weights.raise_for_missing(options.weights)
    if not options.keep_maps.isdigit() and not Path(options.keep_maps).is_file():
        raise UserError(
            f"--keep-maps {options.keep_maps} is neither a number nor a file; give N, or a file of image ids"
        )
    if options.annotations:
        from batchjob.data.annotations import raise_for_missing

        raise_for_missing(options.annotations)


def _check_numbers(options: Options, plan: Plan) -> None:
    """Raises UserError where the model has no such layer, head, stage or size, or an image has fewer patches than k."""
    planned, spec = plan.options, plan.model
    if options.model == planned.model:
        choose_heads(options, spec)
        if options.image_size and options.stage == planned.stage:
            choices.choose_input_px(options.image_size, spec.input_px, patch_px=spec.patch_px)
    if any(getattr(options, name) != getattr(planned, name) for name in ("model", "stage", "image_size")):
        from batchjob.model import describe as model

        spec = model.describe(options)
        choose_heads(options, spec)
    if options.scope == "dataset":
        sample_rows.row_kind(options, spec.grid)
    else:
        raise_for_patches(options.k, spec.num_patches)


def choose_heads(options: Options, spec: ModelSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Resolves the layers and the heads that the options name.

    Parameters
    ----------
    options
        The options of the run.
    spec
        The model.

    Returns
    -------
    (layers, heads), counted from 0; the head 0 alone where tokens are clustered.

    Raises
    ------
    UserError
        The model does not have them, or has no attention to take what is clustered from.
    """
    layers, heads = choices.resolve_layers(options.layers, spec), choices.resolve_heads(options.heads, spec)
    if options.cluster_on == "token":
        return layers, (0,)
    if spec.kind == "cnn" and options.cluster_on != "attention":
        raise UserError(
            f"--cluster-on {options.cluster_on}: {spec.name} computes no attention; give token for its features"
        )
    return layers, heads


def raise_for_patches(k: str, patches: int) -> None:
    """Checks that an image has patches to cluster, and no fewer than `--k` asks for.

    Parameters
    ----------
    k
        As it was given: a whole number, or a rule, which finds no more clusters than there are patches.
    patches
        How many patches an image has.

    Raises
    ------
    UserError
        There are fewer than two patches, or fewer than clusters.
    """
    if patches < 2:
        raise UserError("an image has one patch only, which no clustering can divide; give a larger --image-size")
    if k.lstrip("+-").isdigit() and int(k) > patches:
        raise UserError(f"--k {k} is more than the {patches} patches of an image; give 2 to {patches}")
