"""Verbs as Hydra applications: its options, several jobs, launchers and sweepers, folders of the user's, completion."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf

from flashcp.experiments.cli import VERBS
from flashcp.experiments.cli.compose import compose
from flashcp.experiments.cli.main import main
from flashcp.experiments.sweep.results import REFERENCE, TURNS, read_rows
from tests.checkout import ROOT

PLAN = ["windows=1", "context=1024", "world_size=2"]


# --- Hydra's own options


@pytest.mark.parametrize("verb", ["plan", "simulate", "train", "sweep", "bench planner"])
def test_cfg_shows_the_configuration_and_runs_nothing(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"sweep": "train", "bench planner": "bench/planner"}.get(verb, verb)
    assert main([*verb.split(), "--cfg", "job"]) == 0
    out, err = capsys.readouterr()
    shown = OmegaConf.to_container(OmegaConf.create(out), resolve=True)
    assert isinstance(shown, dict)
    assert shown.keys() == compose(config, []).keys()
    assert err == ""
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_the_configuration_with_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "job", "--package", "loop", "loop.steps=7"]) == 0
    assert "\nsteps: 7\n" in capsys.readouterr().out


def test_info_names_the_defaults() -> None:
    """In a process of its own: for this option Hydra leaves a log on standard output."""
    command = [sys.executable, "-m", "flashcp.experiments.cli.main", "plan", "method=ring", "--info", "defaults"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert re.search(r"\| method/ring +\| ", said.stdout)


def test_options_after_a_bad_override_still_end_in_one_line(refused: Callable[..., str]) -> None:
    assert refused("train", "--cfg", "job", "loop.stepz=1").startswith("loop.stepz: no such override; expected one of")
    assert refused("plan", "-m", "method").startswith("'method' is not an override: expected KEY=VALUE")
    assert refused("train", "--cfg", "job", "--info").startswith("Only one of --run, --multirun, --cfg, --info")
    assert refused("plan", "--config-dir", "nowhere", *PLAN).startswith("Additional config directory")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("plan --cfg nonsense", "argument -c/--cfg: invalid choice: 'nonsense' (choose from 'job', 'hydra', 'all')"),
        ("plan --cfg", "argument -c/--cfg: expected one argument"),
        ("plan windows=1 hydra.run.dir=/dev/null", "[Errno 17] File exists: '/dev/null'"),
        ("plan -m windows=1 hydra.launcher._target_=nope", "Invalid plugin 'nope'"),
        ("plan -m windows=1 hydra.sweeper=null", "Hydra sweeper is not configured"),
    ],
)
def test_what_hydra_cannot_use_is_one_line(refused: Callable[..., str], words: str, message: str) -> None:
    assert refused(*words.split()).startswith(message)


def test_a_file_of_the_user_s_that_is_not_yaml_is_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    mine = tmp_path / "experiment/mine.yaml"
    mine.parent.mkdir()
    mine.write_text("a: [1\n b: {")
    message = refused("sweep", "--config-dir", str(tmp_path), "experiment=mine")
    assert message.startswith("not YAML: ")
    assert str(mine) in message


@pytest.mark.parametrize("value", ["!!int ''", "!!bool x", "!!timestamp a"])
def test_a_tag_that_its_text_does_not_fit_is_one_line(refused: Callable[..., str], value: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text(f"name: {value}")
    assert refused("simulate", "--config-dir", str(tmp_path), "model=mine").startswith("not YAML: ")


def test_a_signal_waits_until_a_verb_is_imported() -> None:
    """Amid the import of a library's native part it would abort the process."""
    code = """if True:
        import os, signal, sys
        from flashcp.experiments.cli import main as command
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        real = command.import_module
        def load(name):
            os.kill(os.getpid(), signal.SIGINT)
            print("imported")
            return real(name)
        command.import_module = load
        sys.exit(command.main(["report", "."]))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "imported\n", "flashcp: interrupted\n")


def test_a_folder_of_the_user_s_brings_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "experiment/mine.yaml"
    mine.parent.mkdir()
    mine.write_text("# @package _global_\ncontext: 512\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}\n")
    assert main(["sweep", "--config-dir", str(tmp_path), "experiment=mine", "--cfg", "job"]) == 0
    assert "\ncontext: 512\n" in capsys.readouterr().out
    assert main(["sweep", "--config-dir", str(tmp_path), "experiment=yours"]) == 2
    assert "experiment=yours: expected one of demo, mine, overlap, beyond_paper" in capsys.readouterr().err


def test_one_job_is_the_same_with_and_without_hydra_s_application(capsys: pytest.CaptureFixture[str]) -> None:
    """Plain overrides are composed without it, which is quicker."""

    def document(*words: str) -> dict[str, Any]:
        assert main(["plan", *PLAN, "method=ring", "--json", *words]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        del found["methods"][0]["ms"]
        return found

    assert document() == document("--run") == document("hydra.verbose=false")


# --- several jobs


def test_a_quick_verb_runs_several_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "-m", *PLAN, "method=llama3,ring"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("llama3 ", "ring "))] == ["llama3", "ring"]
    (left,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == tmp_path / "outputs/multirun/multirun.yaml"


def test_bad_input_of_a_later_job_leaves_nothing(refused: Callable[..., str]) -> None:
    assert refused("train", "-m", "method=llama3,ulysses", "world_size=3").startswith("exchange='ulysses'")


def test_bad_input_leaves_an_older_multirun_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "multirun.yaml").write_text("older")
    assert main(["sweep", f"out={tmp_path}", "method=llama3,ulysses", "world_size=3"]) == 2
    assert (tmp_path / "multirun.yaml").read_text() == "older"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train -m method=llama3,flashcp_paper sharding.target_imbalance=1.2", "method=flashcp_paper has"),
        ("sweep experiment=demo sharding.tolerance=1.1", "method=flashcp has"),
        ("plan -m data=pile,lengths data.path=x", "data=lengths has"),
    ],
)
def test_a_key_that_only_some_of_what_is_swept_has(refused: Callable[..., str], words: str, message: str) -> None:
    verb, *given = words.split()
    said = refused(verb, *given)
    assert said.startswith(f"{given[-1].split('=')[0]}: of what is swept only {message} this key")


def test_several_values_without_m(refused: Callable[..., str]) -> None:
    assert refused("train", "method=llama3,ring").startswith("method=llama3,ring: expected one value (-m or")
    assert refused("train", "experiment=paper_fig3").startswith("experiment=paper_fig3: expected flashcp sweep")


# --- launchers and sweepers


def trained(out: Path, *words: str, code: int = 0) -> dict[str, int]:
    """Train two methods under -m. Returns how many turns' beginnings each run has."""
    assert main(["train", "-m", "method=llama3,flashcp_paper", f"out={out}", *words]) == code
    rows = read_rows(out)
    return {row.provider: len({one.median for one in rows if one.metric == TURNS}) for row in rows}


def test_the_launcher_of_this_process_takes_turns(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained(tmp_path, *tiny).keys() == {"llama3", "flashcp_paper", REFERENCE}
    begun = {row.median for row in read_rows(tmp_path) if row.metric == TURNS}
    assert len(begun) == 1
    assert "speedup over llama3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("launcher", "package", "diverging"), [("joblib", "joblib", []), ("submitit_local", "submitit", ["1e300"])]
)
def test_any_launcher_gets_the_report(
    launcher: str, package: str, diverging: list[str], tmp_path: Path, tiny: list[str]
) -> None:
    """Workers are other processes, which the tests' own command line must not reach: as a user starts it."""
    pytest.importorskip(package)
    command = [sys.executable, "-m", "flashcp.experiments.cli.main", "train", "-m", f"hydra/launcher={launcher}"]
    methods = ["llama3"] if diverging else ["llama3", "flashcp_paper"]
    command += [*tiny, f"method={','.join(methods)}", f"optimizer.lr={','.join(['1e-3', *diverging])}", "out=out"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == len(diverging), done.stderr
    assert done.stdout.count("failed: stdlib-c256-n2-optimizer.lr=1e") == len(diverging)
    found = {(row.case, row.provider) for row in read_rows(tmp_path / "out") if row.metric == "step_ms"}
    varied = "-optimizer.lr=0.001" if diverging else ""
    assert found == {(f"stdlib-c256-n1{varied}", REFERENCE), *((f"stdlib-c256-n2{varied}", name) for name in methods)}
    assert not [row for row in read_rows(tmp_path / "out") if row.metric == TURNS]  # each ran by itself
    assert {"comparison.png", "dashboard.html", "report.md"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_simulations_under_another_launcher_make_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    words = ["sweep", "experiment=paper_fig3", "context=8192", "world_size=2,4", "data.lengths=[8192]", "out=out"]
    for folder, launcher in (("here", "basic"), ("there", "joblib"), ("there", "joblib")):
        (tmp_path / folder).mkdir(exist_ok=True)
        command = [sys.executable, "-m", "flashcp.experiments.cli.main", *words, f"hydra/launcher={launcher}"]
        subprocess.run(command, cwd=tmp_path / folder, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    here, there = (read_rows(tmp_path / name / "out") for name in ("here", "there"))
    assert len(here) > 10
    assert here == there


class Guess(Sweeper):
    """A sweeper that asks for results: one job, then another."""

    results: ClassVar[list[JobReturn]] = []

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: Sequence[str]) -> None:
        for number, method in enumerate(("llama3", "flashcp_paper")):
            (done,) = self.launcher.launch([[*arguments, f"method={method}"]], initial_job_idx=number)
            self.results.append(done)


@pytest.fixture
def guess(monkeypatch: pytest.MonkeyPatch) -> list[JobReturn]:
    """`hydra/sweeper=guess`, as a plugin would bring it."""
    plugin = ModuleType("hydra_plugins.guess")
    plugin.Guess = Guess  # type: ignore[attr-defined]
    for module in (ModuleType("hydra_plugins"), plugin):
        if module is plugin or not find_spec("hydra_plugins"):
            monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Guess, "__module__", plugin.__name__)
    monkeypatch.setattr(Guess, "results", [])
    Plugins.instance().register(Guess)
    ConfigStore.instance().store("guess", {"_target_": "hydra_plugins.guess.Guess"}, group="hydra/sweeper")
    return Guess.results


def test_a_sweeper_that_asks_for_results_gets_the_final_loss(
    guess: list[JobReturn], tmp_path: Path, tiny: list[str]
) -> None:
    assert main(["train", "-m", "hydra/sweeper=guess", *tiny, f"out={tmp_path}", "sweep.reference=false"]) == 0
    losses = {row.provider: row.median for row in read_rows(tmp_path) if row.metric == "final_loss"}
    assert [done.return_value for done in guess] == [losses["llama3"], losses["flashcp_paper"]]
    assert (tmp_path / "report.md").is_file()


# --- completion


def complete(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["-sc", "query=bash"]) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("flashcp train meth", ["method="]),
        ("flashcp train method=flash", ["method=flashcp", "method=flashcp_paper"]),
        ("flashcp sweep experiment=ov", ["experiment=overlap"]),
        ("flashcp simulate world_size=8 cluster=a", ["cluster=a100-nvlink"]),
        ("flashcp train loop.st", ["loop.steps="]),
        ("flashcp ", [*VERBS]),
        ("flashcp bench planner data", ["data=", "data_sets."]),
        ("flashcp bench planner windows=2 see", ["seeds."]),
        ("flashcp report out", []),
        ("flashcp nope x", []),
    ],
)
def test_completion_knows_the_verbs(
    line: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = complete(line, capsys, monkeypatch)
    assert found == words


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash_completes_a_line(tmp_path: Path) -> None:
    command = tmp_path / "flashcp"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m flashcp.experiments.cli.main "$@"\n')
    command.chmod(0o755)
    script = """eval "$(flashcp -sc install=bash)"; complete -p flashcp
COMP_LINE="flashcp train method=rin" COMP_POINT=25 COMP_CWORD=2 COMP_WORDS=(flashcp train method=rin)
hydra_bash_completion; echo "${COMPREPLY[@]}" """
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=os.environ | path)
    installed, found = said.stdout.splitlines()
    assert installed.endswith("-F hydra_bash_completion flashcp")
    assert found.split() == ["method=ring", "method=ring_zigzag"]
