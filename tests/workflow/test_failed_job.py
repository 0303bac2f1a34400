"""A failed job: its message shows the end of its log, and the log of every attempt is kept."""

from __future__ import annotations


def test_the_last_lines_are_shown_and_every_log_is_kept(make_project):
    project = make_project("failed")
    config = 'for number in range(50):\n    print("line", number)\nraise RuntimeError("broken")\n'
    (project.folder / "own.py").write_text(config)
    project.configure(train={"config": "own.py"})
    failed = project.run("--retries", 1, "results/demo/train_config.py", check=False)
    assert failed.returncode != 0
    logs = list((project.folder / "results/demo/logs/render_train_config").glob("*.log"))
    logs.sort(key=lambda log: log.stat().st_mtime)
    assert len(logs) == 2, "one for each attempt"
    shown = failed.stderr.split("Error in rule")[1:]
    for log, message in zip(logs, shown, strict=True):
        lines = log.read_text().splitlines()
        assert (
            lines[:50] == [f"line {number}" for number in range(50)] and "RuntimeError: broken" in lines[51]
        )
        end = "".join(f"    {line}\n" for line in lines[-20:])
        assert f"Last 20 of {len(lines)} lines of {log.relative_to(project.folder)}:\n{end}" in message
        assert f"    {lines[-21]}\n" not in message
