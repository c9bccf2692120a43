"""What imports what: the direction of the three packages, no cycles, and light imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "logitstore": ROOT / "logitstore",
    "logitstore_kernels": ROOT / "kernels" / "logitstore_kernels",
    "logitstore_trainer": ROOT / "trainer" / "logitstore_trainer",
}
MAY_IMPORT = {
    "logitstore": {"logitstore"},
    "logitstore_kernels": {"logitstore_kernels"},
    "logitstore_trainer": set(PACKAGES),
}


def _module_name(package: str, path: Path) -> str:
    parts = path.relative_to(PACKAGES[package].parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, *, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _sources() -> list[tuple[str, Path]]:
    return [(package, path) for package, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))]


def test_packages_import_only_in_their_direction() -> None:
    assert len(_sources()) > 40
    for package, path in _sources():
        for name in _imports(path, top_level_only=False):
            top = name.split(".")[0]
            if top in PACKAGES:
                assert top in MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {name}"


def test_modules_have_no_import_cycles() -> None:
    modules = {_module_name(package, path): path for package, path in _sources()}
    graph = {
        name: {other for other in _imports(path, top_level_only=True) if other in modules and other != name}
        for name, path in modules.items()
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (
            "import logitstore",
            ["torch", "pyarrow", "numba", "transformers", "logitstore_kernels", "logitstore_trainer"],
        ),
        ("import logitstore_kernels", ["transformers", "pyarrow", "logitstore"]),
        ("from logitstore_trainer import collate, TeacherDecoder", ["transformers", "pyarrow", "numba"]),
        ("import logitstore_trainer.cli", ["torch", "transformers", "pyarrow", "matplotlib", "numba", "numpy.f2py"]),
    ],
)
def test_imports_are_light(code: str, absent: list[str]) -> None:
    check = f"{code}; import sys; print([name for name in {absent!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_reading_a_store_of_flat_rows_needs_neither_torch_nor_pyarrow_nor_numba(tmp_path: Path) -> None:
    import numpy as np

    import logitstore

    codec = logitstore.make_codec("topk", vocab_size=20, k=3)
    with logitstore.create(tmp_path / "x.parquet", logitstore.StoreSpec(codec=codec, vocab_size=20)) as writer:
        writer.append(0, [1, 2, 3], codec.targets_from_logits(np.zeros((3, 20), np.float32), [1, 2, 3]))
    check = (
        "import sys, logitstore; store = logitstore.open(sys.argv[1]); dense = store[0].targets.dense_logprobs(2.0); "
        "print(dense.shape, [m for m in ('torch', 'pyarrow', 'numba') if m in sys.modules])"
    )
    command = [sys.executable, "-c", check, str(tmp_path / "x.parquet")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "(2, 20) []"


def test_transformers_works_with_the_repository_root_on_the_path() -> None:
    """Hugging Face has a package named `kernels` that transformers looks for; our folder must not be taken for it."""
    code = (
        "import transformers, torch; from transformers.utils.import_utils import is_kernels_available; "
        "config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, "
        "num_attention_heads=2, num_key_value_heads=2); model = transformers.LlamaForCausalLM(config); "
        "import logitstore, logitstore_kernels, logitstore_trainer; "
        "print(tuple(model(torch.tensor([[1, 2, 3]])).logits.shape), is_kernels_available())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split(") ")[0] + ")" == "(1, 3, 32)"
    for folder in ("kernels", "trainer"):
        assert not (ROOT / folder / "__init__.py").exists()
