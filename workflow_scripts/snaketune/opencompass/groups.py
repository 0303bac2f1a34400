"""Groups of public OpenCompass 0.5.4 datasets, which replace the guide's own non-public datasets."""

from __future__ import annotations

from typing import NamedTuple


class Group(NamedTuple):
    """A group of datasets.

    Attributes:
        variable: Name in the guide's config: `<variable>_datasets`, `<variable>_models`.
        suffix: Suffix of the model's name, after `abbr@iteration`.
        datasets: Modules below `opencompass.configs` and the names of their dataset lists.
        summary: Modules below `opencompass.configs.summarizers.groups` and the names of their averages.
        opt_in: Why the group does not run with OpenCompass as shipped; None if it does.
    """

    variable: str
    suffix: str
    datasets: tuple[tuple[str, str], ...]
    summary: tuple[tuple[str, str], ...] = ()
    opt_in: str | None = None


GROUPS = {
    # The agents are slow, so they come before the base group, as in the guide.
    "longtext": Group(
        "longtext",
        "-longtext",
        (
            ("datasets.leval.leval", "leval_datasets"),
            ("datasets.longbench.longbench", "longbench_datasets"),
        ),
    ),
    "math_agent": Group(
        "math_agent",
        "-math-react",
        (
            ("datasets.gsm8k.gsm8k_agent_gen_c3dff3", "gsm8k_datasets"),
            ("datasets.math.math_agent_gen_0c1b4e", "math_datasets"),
        ),
        opt_in="its agent inferencer lacks restore_from_jsonl, which the base class calls",
    ),
    "cibench": Group(
        "cibench",
        "-cibench-react",
        (
            ("datasets.CIBench.CIBench_template_gen_e6b12a", "cibench_datasets"),
            ("datasets.CIBench.CIBench_generation_gen_8ab0dc", "cibench_datasets"),
        ),
        (("cibench", "cibench_summary_groups"),),
        opt_in="same as math_agent; also, its agent and interpreter (opencompass.lagent) are not in the wheel",
    ),
    "plugin_eval": Group(
        "plugin_eval",
        "-plugin-eval",
        (
            ("datasets.teval.teval_en_gen_1ac254", "teval_datasets"),
            ("datasets.teval.teval_zh_gen_1ac254", "teval_datasets"),
        ),
        (("teval", "teval_summary_groups"),),
    ),
    "base": Group(
        "base",
        "",
        (("dataset_collections.chat_OC15", "datasets"),),
        (
            ("mmlu", "mmlu_summary_groups"),
            ("cmmlu", "cmmlu_summary_groups"),
            ("ceval", "ceval_summary_groups"),
            ("bbh", "bbh_summary_groups"),
            ("GaokaoBench", "GaokaoBench_summary_groups"),
        ),
    ),
}
