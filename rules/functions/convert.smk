"""Functions of the conversion rules and their gate. No rules here."""


def hf_flags(wildcards):
    """Returns the flags of convert_pth_to_hf.py."""
    return flags(**options_of("convert_pth_to_hf", RUNS[wildcards.run], "hf", "model"))


def has_turbomind(wildcards):
    return RUNS[wildcards.run]["turbomind"]["enabled"]


def is_converted(wildcards):
    """True if the run has TurboMind files, which can be proved."""
    return has_turbomind(wildcards) and RUNS[wildcards.run]["turbomind"]["mode"] == "convert"


def runs_in_mode(mode):
    """Returns a pattern of the runs whose TurboMind folder is made in this mode."""
    names = [re.escape(run) for run in RUNS if RUNS[run]["turbomind"]["mode"] == mode]
    return "|".join(names) or "(?!)"


def own_prompts(wildcards):
    return RUNS[wildcards.run]["evaluate"]["prompts"] or []


def has_parity(wildcards):
    return RUNS[wildcards.run]["parity"]["enabled"]


def parity_flags(wildcards, input):
    """Returns the flags of check_parity.py, without inputs that the run does not have."""
    return flags(
        turbomind=input.get("turbomind") or None,
        readings=input.get("readings") or None,
        **options_of("check_parity", RUNS[wildcards.run], "evaluate", "tokenize", "model"),
    )


def parity_gate(wildcards):
    """Returns the gate before the tuned model's evaluation, if the config enables it."""
    gated = wildcards.label == "tuned" and RUNS[wildcards.run]["parity"]["enabled"]
    return PARITY.format(run=wildcards.run) if gated else []


def model_card_flags(wildcards, input):
    """Returns the flags of write_model_card.py."""
    converted = is_converted(wildcards)
    return flags(
        evaluations=list(input.evaluations),
        parity=input.get("parity") or None,
        turbomind=input.get("turbomind") if converted else None,
        direct=None if converted else input.get("turbomind") or None,
        **(options_of("write_model_card", RUNS[wildcards.run], "turbomind") if converted else {}),
    )
