"""What docs/clusters.md tells people to type exists: its scripts parse, and the options and arguments are there."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import distributed
import pytest
import yaml
from distributed.cli import dask_scheduler, dask_ssh, dask_worker

from ditr_cache import cli

PAGE = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
COMMANDS: dict[tuple[str, ...], click.Command] = {
    ("dask", "worker"): dask_worker.main,
    ("dask", "scheduler"): dask_scheduler.main,
    ("dask", "ssh"): dask_ssh.main,
    ("ditr-cache", "extract"): cli.cli.commands["extract"],
}


def blocks(language: str) -> list[str]:
    """Code blocks of the page, without the indent that they have in a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(found) == PAGE.count(f"```{language}\n") > 0
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def written_commands() -> list[list[str]]:
    """Words of every command line on the page that is a key of `COMMANDS`, from its name on."""
    lines = [line for text in blocks("bash") for line in text.replace("\\\n", " ").splitlines()]
    lines += [c for line in lines for c in re.findall(r'"([^"]*dask worker[^"]*)"', line)]
    found = [words for line in lines if not line.startswith("#") for words in (shlex.split(line),)]
    for document in (d for text in blocks("yaml") for d in yaml.safe_load_all(text)):
        found += [container["args"] for container in containers(document)]
    names = {name: len(name) for name in COMMANDS}
    return [
        words[start:]
        for words in found
        for start in range(len(words))
        if any(tuple(words[start : start + n]) == name for name, n in names.items())
    ]


def containers(document: Any) -> list[dict[str, Any]]:
    if isinstance(document, list):
        return [c for item in document for c in containers(item)]
    if not isinstance(document, dict):
        return []
    return document.get("containers", []) + [c for value in document.values() for c in containers(value)]


def test_shell_scripts_parse() -> None:
    for text in blocks("bash"):
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_command_and_option_exists() -> None:
    written = written_commands()
    assert {tuple(words[:2]) for words in written} == set(COMMANDS)
    assert len(written) == 13
    for words in written:
        command = COMMANDS[words[0], words[1]]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        used = {w.split("=")[0] for w in words[2:] if w.startswith("-")}
        assert used <= known, (words, used - known)


@pytest.mark.parametrize("document", [d for text in blocks("yaml") for d in yaml.safe_load_all(text)])
def test_manifests_hold_together(document: dict[str, Any]) -> None:
    assert {"apiVersion", "kind", "metadata", "spec"} == set(document)
    assert containers(document)
    for container in containers(document):
        assert all(isinstance(argument, str) for argument in container["args"])
    if document["kind"] == "DaskCluster":
        scheduler = document["spec"]["scheduler"]
        ports = {port["name"] for container in containers(scheduler) for port in container["ports"]}
        assert {port["targetPort"] for port in scheduler["service"]["ports"]} == ports
        assert scheduler["service"]["selector"]["dask.org/cluster-name"] == document["metadata"]["name"]
    else:
        assert document["kind"] == "Job"
        assert f"--scheduler=tcp://{cluster_name()}-scheduler:8786" in containers(document)[0]["args"]


def cluster_name() -> str:
    """Of the `DaskCluster` on the page."""
    return str(
        next(d for text in blocks("yaml") if (d := yaml.safe_load(text))["kind"] == "DaskCluster")["metadata"]["name"]
    )


def test_python_scripts_name_what_there_is() -> None:
    calls = {
        node.func.id: {k.arg: k.value for k in node.keywords}
        for text in blocks("python")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    ssh = calls["SSHCluster"]
    assert set(ssh) <= set(inspect.signature(distributed.SSHCluster).parameters)
    for argument, of in (("worker_options", distributed.Nanny), ("scheduler_options", distributed.Scheduler)):
        assert set(ast.literal_eval(ssh[argument])) <= set(inspect.signature(of.__init__).parameters)
    assert "SLURMCluster" in calls
