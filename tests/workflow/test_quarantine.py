"""Bad lines and odd names through the whole workflow: every line ends up in exactly one place."""

from __future__ import annotations

import json

GOOD = '[{"role": "user", "content": "hi %d"}, {"role": "assistant", "content": "yes"}]'
# No braces, which Snakemake would fill in, and no line break, which its log files cannot have.
ODD = "a b; 'c' \"d\" $(e) `f` ü 数据 #%&*[x].v2"


def test_each_line_is_in_one_place(make_project):
    project = make_project("bad_lines")
    file = project.folder / "processed" / ODD / "processed" / ODD / f"{ODD}.jsonl"
    file.parent.mkdir(parents=True)
    bad = [f"oops {i}" for i in range(40)] + ["[]"]
    good = [GOOD % i for i in range(160)]
    file.write_text("\n".join(good + bad), encoding="utf-8")
    project.configure(data={"datasets": [ODD]}, heldout={"share": 0.3})

    stopped = project.run("tokenize", check=False)
    assert stopped.returncode != 0 and f"{ODD}.jsonl:161: not JSON" in stopped.stdout + stopped.stderr

    project.configure(tokenize={"on_bad_sample": "quarantine", "max_bad_share": 0.25})
    project.run("tokenize")
    (index,) = project.folder.glob("results/shared/data/*/tokenized.json")
    part = index.parent / "heldout_parts" / "batch-0001-of-0001.json"
    project.run(part.relative_to(project.folder))

    totals = json.loads((index.parent / "manifests" / f"{ODD}.json").read_text())["totals"]
    (held,) = (index.parent / "heldout").rglob("*.jsonl")
    (quarantine,) = (index.parent / "manifests").rglob("*.quarantine.jsonl")
    aside = [json.loads(line)["raw"] for line in quarantine.read_text(encoding="utf-8").splitlines()]
    assert aside == bad
    lines = held.read_text(encoding="utf-8").splitlines()
    assert set(lines) < set(good) and len(lines) == totals["heldout"] > 20
    assert totals["samples"] + totals["heldout"] + totals["quarantined"] == totals["lines"] == 201
    stats = json.loads((index.parent / "manifests" / ODD / "stats.json").read_text(encoding="utf-8"))
    assert stats["bad_lines"] == {"not JSON": 40, "the conversation is empty": 1}
