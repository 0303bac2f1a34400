"""The groups of public OpenCompass 0.5.4 datasets that stand for those of the guide, whose own are not public."""

from __future__ import annotations

from typing import NamedTuple


class Group(NamedTuple):
    """A group of datasets.

    Attributes:
        variable: What the guide calls it in its config: `<variable>_datasets`, `<variable>_models`.
        suffix: What stands behind `abbr@iteration` in the name of its model.
        datasets: Modules below `opencompass.configs` and the name of their list of datasets.
        summary: Modules below `opencompass.configs.summarizers.groups` and the names of their averages.
        opt_in: Why it does not run as OpenCompass ships it; None where it does.
    """

    variable: str
    suffix: str
    datasets: tuple[tuple[str, str], ...]
    summary: tuple[tuple[str, str], ...] = ()
    opt_in: str | None = None


GROUPS = {
    # The agents are slow: they stand before the base group, as in the guide.
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
        opt_in="the agent inferencer of 0.5.4 lacks restore_from_jsonl, which its base class calls",
    ),
    "cibench": Group(
        "cibench",
        "-cibench-react",
        (
            ("datasets.CIBench.CIBench_template_gen_e6b12a", "cibench_datasets"),
            ("datasets.CIBench.CIBench_generation_gen_8ab0dc", "cibench_datasets"),
        ),
        (("cibench", "cibench_summary_groups"),),
        opt_in="as math_agent; and its agent and its interpreter, opencompass.lagent, are not in the wheel",
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
