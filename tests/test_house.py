"""How the files stand to each other: which may import which, and one list of dependencies written twice."""

import ast
import os
import re
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT, shell

# every file may import those before it; research/ is one room, the last
ROOMS = ("common recipes flags attention model recurrent interleave optim sharding dataset prepare_data "
         "checkpointing tracking plan sample core tokens_page eval_core soundness watchdog train "
         "export bench research").split()
SCRIPTS = [path for path in ROOT.glob("*.py") if path.stem not in ("test_model", "conftest")]
RESEARCH = list(ROOT.glob("research/*.py"))


def imports(path):
    """The modules that a file imports, inside functions, too: {"common", "research.plot", "os.path", ..}."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports need a package, and there is none"
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules

def rooms_imported(path):
    return {module.split(".")[0] for module in imports(path)}.intersection(ROOMS)

@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_imports_point_downwards(path):
    below = ROOMS[:ROOMS.index(path.stem)]
    assert rooms_imported(path) <= set(below)

def test_common_and_attention_import_nothing_of_ours():
    assert rooms_imported(ROOT / "common.py") == rooms_imported(ROOT / "attention.py") == set()

def test_every_script_is_a_room():
    assert {path.stem for path in SCRIPTS} | {"research"} == set(ROOMS)

def test_research_has_no_circle():
    assert RESEARCH
    graph = {f"research.{path.stem}": imports(path) for path in RESEARCH}
    TopologicalSorter(graph).prepare()  # raises CycleError

@pytest.mark.parametrize("script", ["sample", "eval_core", "train", "prepare_data"])
def test_help_and_wrong_flags_do_not_wait_for_torch(script, tmp_path):
    """torch takes seconds to import; here it cannot be imported at all."""
    (tmp_path / "torch.py").write_text("raise ImportError('too early')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    shown = shell(f"{script}.py", "--help", PYTHONPATH=path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("usage: ")
    refused = shell(f"{script}.py", "--no-such-flag", PYTHONPATH=path)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ")

def test_pyproject_and_requirements_name_the_same_packages():
    """With the same bounds; but for torch, which requirements.txt pins to the version that is tested."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    optional = project["project"]["optional-dependencies"]
    declared = project["project"]["dependencies"] + optional["research"] + optional["dev"]
    required = re.findall(r"^[^#\s]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)

    torch_bound = [line for line in declared if line.startswith("torch")]
    torch_pin = [line for line in required if line.startswith("torch")]
    assert torch_bound == ["torch>=2.11"]
    assert len(torch_pin) == 1 and torch_pin[0].startswith("torch==2.")
    assert sorted(set(declared) - set(torch_bound)) == sorted(set(required) - set(torch_pin))
    assert sorted(project["tool"]["setuptools"]["py-modules"]) == sorted(ROOMS[:-1])

def test_every_mutation_still_applies():
    """tests/mutations.py changes code by its text: a mutation that applies no more protects nothing."""
    import mutations
    for subject, what, file, old, new, _, _ in mutations.MUTATIONS:
        mutated = (ROOT / file).read_text("utf-8")
        assert mutated.count(old) == 1, f"{subject}: {what}: its code is no more in {file}"
        ast.parse(mutated.replace(old, new))  # it breaks a protection, not the file
