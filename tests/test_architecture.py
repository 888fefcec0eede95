"""The layers as data, and gates on what our code may contain. Reads the source; imports little of it."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignment.config import (
    ClusterConfig,
    Config,
    DpoRunConfig,
    IterativeRunConfig,
    KtoRunConfig,
    LiveRunConfig,
    PpoRunConfig,
    RankRunConfig,
    RecommenderRunConfig,
    RewardModelRunConfig,
    SftRunConfig,
)
from alignment.config.zoo import PeftZooConfig
from alignment.config_io import load_config

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("alignment", "actors", "rewards", "recipes", "benchmarks")

# A name covers the module and everything below it; the longest one that fits decides. Imports go down or sideways.
LAYERS = {
    **dict.fromkeys(["alignment.types", "alignment.config", "alignment.masked", "alignment.distributed"], 0),
    **dict.fromkeys(["alignment.run_directory", "alignment.metrics", "alignment.kl_controller", "rewards"], 0),
    **dict.fromkeys(["alignment.packing", "alignment.judgements", "alignment.ensembles"], 0),
    **dict.fromkeys(["alignment.preference_terms", "alignment.verified_lines"], 0),
    **dict.fromkeys(["alignment.interfaces", "alignment.config_io", "alignment.logprobs", "alignment.kl"], 1),
    "alignment.rollout_correction": 1,
    **dict.fromkeys(["alignment.advantages", "alignment.losses", "alignment.batching", "alignment.adapters"], 1),
    **dict.fromkeys(["alignment.aggregation", "alignment.preference_losses", "alignment.label_losses"], 1),
    **dict.fromkeys(["alignment.sharding", "alignment.preference_objectives"], 1),
    **dict.fromkeys(["alignment.schedules", "alignment.bootstrap", "alignment.scores", "alignment.data"], 1),
    **dict.fromkeys(["alignment.memory", "alignment.fingerprint", "alignment.quantization"], 1),
    **dict.fromkeys(["alignment.model_card", "alignment.reward_objectives", "alignment.calibration"], 1),
    **dict.fromkeys(["alignment.hacking", "alignment.auc", "alignment.reference_cache", "alignment.ranking"], 1),
    **dict.fromkeys(
        ["alignment.recommendation_metrics", "alignment.recommendation_baselines", "alignment.recommendation_report"],
        1,
    ),
    **dict.fromkeys(["alignment.feedback_log", "alignment.feedback_file"], 1),
    **dict.fromkeys(["alignment.replay", "alignment.labelling"], 1),
    **dict.fromkeys(
        [
            "alignment.packed",
            "alignment.shared_prompts",
            "alignment.candidates",
            "alignment.experience",
            "alignment.models",
            "alignment.reference",
            "alignment.forward",
            "alignment.engines",
            "alignment.checkpoint",
        ],
        2,
    ),
    **dict.fromkeys(["alignment.learners", "alignment.generation", "alignment.model_checks", "alignment.forward"], 2),
    **dict.fromkeys(["alignment.planning", "alignment.plan"], 2),
    "alignment.loops": 3,
    "actors": 4,
    **dict.fromkeys(["recipes", "benchmarks"], 5),
}
MAY_IMPORT_OURS = {"alignment": {"alignment"}, "rewards": {"rewards"}, "actors": {"actors", "alignment", "rewards"}}
MAY_IMPORT = {"ray": {"actors", "recipes"}, "vllm": {"actors"}}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


def layer(module: str) -> int | None:
    fits = [name for name in LAYERS if module == name or module.startswith(f"{name}.")]
    return LAYERS[max(fits, key=len)] if fits else None


def imports(tree: ast.AST, module: str) -> Iterator[tuple[str, int]]:
    """Dotted name and line of every import in a tree, wherever it stands: inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                # `from alignment import kl` names a module, `from alignment.kl import x` a thing in one.
                full = f"{base}.{alias.name}"
                yield (full if full in SOURCES else base), node.lineno


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def at_import_time(tree: ast.Module, module: str) -> Iterator[str]:
    """Names imported when the module is: not inside functions, not for the type checker alone."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.stmt) and is_type_checking(node):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (name for name, _ in imports(node, module))
        waiting.extend(ast.iter_child_nodes(node))


def parsed(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def import_faults(tree: ast.AST, module: str) -> list[str]:
    package, own = module.split(".")[0], layer(module)
    faults = []
    for name, line in imports(tree, module):
        top = name.split(".")[0]
        where = f"{module}:{line} imports {name}"
        if top in MAY_IMPORT and package not in MAY_IMPORT[top]:
            faults.append(f"{where}: {top} belongs in {sorted(MAY_IMPORT[top])}")
        if top in FOLDERS and top not in MAY_IMPORT_OURS.get(package, set(FOLDERS)):
            faults.append(f"{where}: {package} may import of ours only {sorted(MAY_IMPORT_OURS[package])}")
        elif top in FOLDERS and name not in FOLDERS:
            target = layer(name)
            if own is not None and target is not None and target > own:
                faults.append(f"{where}: layer {own} may not import layer {target}")
    return faults


def test_every_module_has_a_layer():
    packages = {module for module, path in SOURCES.items() if path.name == "__init__.py"}
    assert [module for module in SOURCES if module not in packages and layer(module) is None] == []


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_one_way(module):
    assert import_faults(parsed(module), module) == []


@pytest.mark.parametrize(
    ("module", "code", "fault"),
    [
        ("alignment.losses", "import ray", "ray belongs in"),
        ("alignment.losses", "def f():\n    import ray.util", "ray belongs in"),
        ("rewards.judge", "from ray import remote", "ray belongs in"),
        ("recipes.sft", "import vllm", "vllm belongs in"),
        ("alignment.kl", "from alignment.learners.base import Tally", "layer 1 may not import layer 2"),
        ("alignment.kl", "from alignment import models", "layer 1 may not import layer 2"),
        ("alignment.kl", "from . import models", "layer 1 may not import layer 2"),
        ("alignment.learners.base", "from ..loops import ppo", "layer 2 may not import layer 3"),
        ("alignment.loops.ppo", "from rewards.text import f", "may import of ours only ['alignment']"),
        ("rewards.text", "import alignment.masked", "may import of ours only ['rewards']"),
        ("actors.policy", "import recipes.common", "may import of ours only ['actors', 'alignment', 'rewards']"),
    ],
)
def test_an_import_the_wrong_way_is_found(module, code, fault):
    faults = import_faults(ast.parse(code), module)
    assert len(faults) == 1
    assert fault in faults[0]


def test_no_cycles_at_import_time():
    graph = {
        module: {name for name in at_import_time(parsed(module), module) if name in SOURCES} for module in SOURCES
    }
    order: list[str] = []
    path: list[str] = []

    def visit(module: str) -> None:
        assert module not in path, f"cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in order:
            path.append(module)
            for name in sorted(graph[module]):
                visit(name)
            path.pop()
            order.append(module)

    for module in graph:
        visit(module)
    assert len(order) == len(SOURCES)


HEAVY = ("ray", "vllm", "deepspeed", "transformers", "peft", "datasets")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("alignment.config", (*HEAVY, "torch")),
        ("alignment.config_io", (*HEAVY, "torch")),
        ("alignment.run_directory", (*HEAVY, "torch")),
        ("alignment.losses", HEAVY),
        ("alignment.checkpoint", HEAVY),
        ("rewards", (*HEAVY, "torch")),
        ("actors", ("vllm", "deepspeed")),
    ],
)
def test_imports_are_light(module, absent):
    code = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_our_packages_come_from_this_checkout():
    code = f"import {', '.join(f for f in FOLDERS if (ROOT / f / '__init__.py').exists())}; "
    code += "import sys; print(*[sys.modules[n].__file__ for n in ('alignment', 'actors', 'rewards', 'recipes')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = [str(ROOT / name / "__init__.py") for name in ("alignment", "actors", "rewards", "recipes")]
    assert done.stdout.split() == expected


UNPICKLERS = ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")


def dangers(tree: ast.AST) -> list[str]:
    """What runs code that data brings along, or hands text to a shell."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "VLLM_ALLOW_INSECURE" in node.value:
            found.append(f"{node.lineno}: VLLM_ALLOW_INSECURE")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        head, _, last = name.rpartition(".")
        for flag, value in (("weights_only", "False"), ("trust_remote_code", "True"), ("shell", "True")):
            if flags.get(flag) == value:
                found.append(f"{node.lineno}: {flag}={value}")
        if name in ("eval", "exec", "os.system", "os.popen"):
            found.append(f"{node.lineno}: {name}()")
        if last in ("load", "loads", "open", "Unpickler") and head in UNPICKLERS:
            found.append(f"{node.lineno}: {name}()")
        if name == "torch.load" and flags.get("weights_only") != "True":
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if last in ("load", "load_all") and head == "yaml" and flags.get("Loader") != "_PlainLoader":
            found.append(f"{node.lineno}: yaml.load")
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_no_dangerous_calls(module):
    assert dangers(parsed(module)) == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(p, weights_only=False)",
        "torch.load(p)",
        "pickle.loads(b)",
        "cloudpickle.load(f)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "subprocess.run(c, shell=True)",
        "eval(text)",
        "exec(text)",
        "os.system(c)",
        "yaml.load(t, Loader=yaml.Loader)",
        "env['VLLM_ALLOW_INSECURE_SERIALIZATION'] = '1'",
    ],
)
def test_a_dangerous_call_is_found(code):
    assert len(dangers(ast.parse(code))) >= 1


def test_harmless_calls_are_left_alone():
    harmless = (
        "model.eval(); json.loads(t); torch.load(p, weights_only=True); f(trust_remote_code=False); re.compile(t)"
    )
    assert dangers(ast.parse(harmless)) == []


def test_packages_are_listed_one_by_one():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = ("alignment", "actors", "rewards", "recipes")
    on_disk = [
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in packages
        for path in (ROOT / name).rglob("__init__.py")
    ]
    with_code = {
        ".".join(path.parent.relative_to(ROOT).parts) for name in packages for path in (ROOT / name).rglob("*.py")
    }
    assert sorted(listed) == sorted(on_disk)
    assert with_code <= set(on_disk), "a folder with code and without __init__.py is not installed"


def test_tests_are_not_packages():
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_no_recipe_hides_a_module():
    used = {name.split(".")[0] for module in SOURCES for name, _ in imports(parsed(module), module)}
    taken = used | set(sys.stdlib_module_names) | {"datasets", "types", "config", "ray", "vllm", "torch"}
    names = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"__init__"}
    assert names & taken == set()


def config_class(path: Path) -> type[Config]:
    if path.parent.name == "cluster":
        return ClusterConfig
    kinds: dict[str, type[Config]] = {
        "ppo_": PpoRunConfig,
        "rank_": RankRunConfig,
        "reward_model_": RewardModelRunConfig,
        "peft_zoo": PeftZooConfig,
        "dpo_recommender": RecommenderRunConfig,
        "live_": LiveRunConfig,
        "dpo_": DpoRunConfig,
        "iterative_": IterativeRunConfig,
        "kto_": KtoRunConfig,
        **dict.fromkeys(["sft_", "lora_sft_", "qlora_"], SftRunConfig),
    }
    return next(kind for prefix, kind in kinds.items() if path.name.startswith(prefix))


YAML_FILES = [
    *sorted((ROOT / "recipes" / "configs").rglob("*.yaml")),
    *(path for path in sorted((ROOT / "cluster").glob("*.yaml")) if path.name != "runtime_env.yaml"),
]


def test_there_are_configs_to_check():
    folders = {path.parent.name for path in YAML_FILES}
    assert folders == {"configs", "cluster"}


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_yaml_file_parses(path):
    assert isinstance(load_config(config_class(path), file=path), config_class(path))
