"""Functions shared by the rules of several stages. No rules here."""


def path_of(pattern):
    """Returns an input function that fills a run's {run}, {tokenizer}, {data} and {pack} into a path pattern."""

    def fill(wildcards):
        run = wildcards.run
        return pattern.format(run=run, tokenizer=tokenizer_key(run), data=data_key(run), pack=pack_key(run))

    return fill


def proofs_of(chosen):
    """Returns an input function: the proofs of the base models of chosen runs, for rules that must not start before.

    `chosen` maps wildcards to runs. Results from before there were proofs are left as they are.
    """

    def proofs(wildcards):
        if not OLD_RESULTS:
            keys = {model_key(run): None for run in chosen(wildcards) if RUNS[run]["train"]["config"] is None}
            return [ancient(ARCHITECTURE.format(model=key)) for key in keys]
        return []

    return proofs


def proof_flags(wildcards):
    """Returns the flags of prove_architecture.py, for a hub model with the runs to check against lmdeploy's limits.

    The runs are there even when the start has checked them: a parameter must not depend on what is on this machine.
    """
    model = MODELS[wildcards.model]
    runs = {
        name: {section: RUNS[name][section] for section in ("model", "turbomind", "parity", "opencompass")}
        for name in RUNS
        if RUNS[name]["model"]["hub"]
        and RUNS[name]["turbomind"]["enabled"]
        and model_key(name) == wildcards.model
    }
    limits = flags(turbomind_runs=json.dumps(runs, sort_keys=True)) if runs else ""
    return f"{model['options']} {limits}".rstrip()


# Results whose jobs ran without a proof. A new input would run them all again.
OLD_RESULTS = (
    not Path(f"{RESULTS}/{result_paths.MODELS}").is_dir()
    and Path(f"{RESULTS}/{result_paths.SHARED}/tokenizer").is_dir()
)


def folder_digest(folder, patterns):
    """Returns a digest of the files of a folder that define a model or tokenizer. Returns a hub name unchanged."""
    if not Path(folder).is_dir():
        return folder
    return FINGERPRINTS.files([path for pattern in patterns for path in Path(folder).glob(pattern)], folder)


def model_source(run):
    return RUNS[run]["model"]["path"] or RUNS[run]["model"]["hub"]


def model_digest(wildcards):
    return folder_digest(model_source(wildcards.run), ["config.json", "*.safetensors", "*.bin"])


def cluster_of(key):
    """Returns a resource function: a setting of the training's Slurm job."""
    return lambda wildcards: RUNS[wildcards.run]["cluster"][key]


def heldout_parts(wildcards):
    """Returns the parts of the held-out data; none if the run has its own held-out folder."""
    data = data_key(wildcards.run)
    if wildcards.run in OWN_HELDOUT:
        return []
    return expand(HELDOUT_PART, data=data, part=HELDOUT_PARTS[data])


def heldout_dir(wildcards):
    return RUNS[wildcards.run]["heldout"]["processed_dir"] or path_of(f"{DATA}/heldout")(wildcards)


def heldout_digest(wildcards):
    """Returns the digest of the user's own held-out folder. Other held-out data are tracked by their parts."""
    own = OWN_HELDOUT.get(wildcards.run)
    return own and FINGERPRINTS.files(
        [path for paths in own.values() for path in paths], heldout_dir(wildcards)
    )


def print_plan():
    """Prints the cost table of a dry run. Snakemake has no handler for dry runs, so this one runs at exit."""
    if not workflow.dryrun or Quietness.ALL in (workflow.output_settings.quiet or ()):
        return
    # A dry run does not know its executor, but only a cluster's comes with a number of jobs.
    cluster = workflow.resource_settings.nodes is not None
    order = workflow.dag.toposorted(set(workflow.dag.needrun_jobs(exclude_finished=False)))
    jobs = [
        planned_job(
            job.rule.name,
            cluster and job.rule.name not in workflow._localrules,
            job.threads,
            job.resources,
            job.benchmark and WORKDIR / job.benchmark,
        )
        for level in order
        for job in sorted(level, key=str)
        if not job.is_norun
    ]
    if jobs:
        print(f"\n{render_job_table(jobs, WORKDIR / BENCHMARKS)}", end="")
