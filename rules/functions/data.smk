"""Functions of the rules from the JSONL files to the pack plan. No rules here."""


def part_files(wildcards):
    """Returns the JSONL files of a tokenising job."""
    return [chunk.source for chunk in PARTS[wildcards.data][wildcards.part]]


def heldout_part_files(wildcards):
    """Returns the JSONL files of a split_heldout job."""
    datasets = DATASETS[wildcards.data]
    return [path for name in HELDOUT_PARTS[wildcards.data][wildcards.part] for path in datasets[name]]


def sources_of(files):
    """Returns an input function for JSONL files. Their content counts, through `digest_of`, not their mtime."""
    return lambda wildcards: [ancient(str(path)) for path in files(wildcards)]


def digest_of(files):
    """Returns a function that returns the digest of a job's JSONL files."""
    return lambda wildcards: FINGERPRINTS.files(files(wildcards), DATA_SPECS[wildcards.data]["processed_dir"])


def tokenize_flags(wildcards):
    """Returns the flags of tokenize_dataset.py that parts and their merge share."""
    return flags(
        processed_dir=DATA_SPECS[wildcards.data]["processed_dir"],
        tokenized_dir=DATA.format(data=wildcards.data),
        **options_of("tokenize_dataset", data_settings(wildcards), "data", "heldout", "tokenize"),
    ) + dataset_flags(wildcards)


def data_settings(wildcards):
    """Returns the settings, by section, of the runs that share these data."""
    spec = DATA_SPECS[wildcards.data]
    return {
        "data": {"max_tokens": spec["max_tokens"]},
        "heldout": {"share": spec["heldout_share"], "seed": spec["heldout_seed"]},
        "tokenize": spec["tokenize"] | BAD_LINES[wildcards.data],
    }


def heldout_tokenizer(wildcards):
    """Returns the tokenizer if it is needed to find bad lines, those with a control token."""
    spec = DATA_SPECS[wildcards.data]
    needed = spec["tokenize"]["control_tokens"] == "error" and spec["heldout_share"]
    return TOKENIZER.format(tokenizer=spec["tokenizer"]) if needed else []


def heldout_flags(wildcards, input):
    """Returns the flags of split_heldout.py: which lines are held out, and which are bad."""
    spec = DATA_SPECS[wildcards.data]
    return flags(
        processed_dir=spec["processed_dir"],
        output_dir=f"{DATA}/heldout".format(data=wildcards.data),
        tokenizer_path=str(input.tokenizer) or None,
        **options_of("split_heldout", data_settings(wildcards), "heldout", "data", "tokenize"),
    ) + dataset_flags(wildcards)


def dataset_flags(wildcards):
    """Returns flags for the datasets that the config names. Without them, a script takes all."""
    names = DATA_SPECS[wildcards.data]["datasets"] or []
    return "".join(f" {flags(dataset=name)}" for name in names)


def base_tokenizer_digest(wildcards):
    return folder_digest(TOKENIZERS[wildcards.tokenizer]["source"], ["tokenizer*", "special_tokens_map.json"])


def plan_flags(wildcards):
    """Returns the flags of plan_packing.py."""
    data, pack = wildcards.data, PACK_SPECS[wildcards.pack]
    return flags(
        train_folder=TRAIN_FOLDER.format(data=data),
        processed_dir=DATA_SPECS[data]["processed_dir"],
        output=PACK.format(data=data, pack=wildcards.pack),
        **options_of("plan_packing", {"packing": pack, "train": pack}, "packing.weights", "packing", "train"),
    )
