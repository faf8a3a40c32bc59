"""Tasks of lm-evaluation-harness; the oracle is its own backend for transformers.

It runs where lm-eval is installed: ``make harness``.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors

from tests.helpers.commands import finished, refused
from tests.helpers.models import saved_model
from tests.helpers.processes import ROOT, minigpt
from tests.helpers.recipes import TINY

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from minigpt_cli.commands.eval_tasks import _wrap
from minigpt_cli.core.errors import UserError
from minigpt_cli.evaluate.harness import _set_fewshot
from minigpt_cli.evaluate.harness_tasks import _compose, find_tasks, loaded_tasks
from minigpt_cli.huggingface.load import load_model

DATA = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/data.jsonl
test_split: test
"""
TASKS = {
    "pick": """
output_type: multiple_choice
num_fewshot: 1
fewshot_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 2.0}
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "last": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{next}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "write": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{next}}"
generation_kwargs: {until: ["e t", "\\n"], max_gen_toks: 14, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
GROUP = "group: mine\ntask: [pick, texts]\naggregate_metric_list: [{metric: acc}]\n"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of all kinds on 12 samples of a text, in a directory."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [line.strip() for line in (ROOT / "LICENSE").read_text().splitlines() if line.strip()]
    draw = random.Random(0)
    with (folder / "data.jsonl").open("w") as file:
        for index in range(12):
            words = draw.choice([line for line in lines if len(line.split()) > 5]).split()
            choices = [" ".join(draw.choice(lines).split()[:2]) for _ in range(3)]
            record = {
                "question": " ".join(words[: draw.randrange(1, 5)] * draw.randrange(1, 9)),
                "choices": [*choices, "A", "B"],
                "answer": index % 5,
                "next": words[5],
                "text": "\n".join(draw.sample(lines, draw.randrange(1, 5))),
            }
            file.write(json.dumps(record) + "\n")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(DATA.format(name=name, folder=folder) + text)
    (folder / "mine.yaml").write_text(GROUP)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A finished run, and its export beside it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.toml").write_text(TINY.format(data=dataset))
    longer = ("--set", "model.max_position_embeddings=64")
    finished("pretrain", "tiny.toml", *longer, cwd=folder)
    finished("export", "runs/tiny", "export", cwd=folder)
    return folder / "runs/tiny"


def with_begin_of_text(folder: Path) -> None:
    """Let the tokenizer put a token before each text, as Llama's does."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def ours(path: Path, batch_size: int = 4, chat: bool = False) -> Any:
    trained = load_model(path, torch.device("cpu"), [])
    return _wrap(trained, batch_size, torch.float32, chat)


def theirs(path: Path) -> Any:
    return HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=4)


def samples(
    model: Any, tasks: Path, names: list[str], **how: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answers to each sample of each task, and the tasks' results."""
    with loaded_tasks(find_tasks(names, tasks, trust=False)) as loaded:
        for task in loaded["tasks"].values():
            _set_fewshot(task, None)
        found = evaluate(lm=model, task_dict=loaded, bootstrap_iters=0, **how)
    answers = {name: [each["resps"] for each in its] for name, its in found["samples"].items()}
    return answers, found["results"]


def numbers(value: Any) -> list[float]:
    if isinstance(value, list | tuple):
        return [number for each in value for number in numbers(each)]
    return [float(value)]


@pytest.mark.parametrize("kind", ["run", "gpt2", "qwen3", "llama begin-of-text"])
def test_equals_the_backend_for_transformers(
    kind: str, run: Path, tasks: Path, dataset: Path, tmp_path: Path
):
    if kind == "run":
        model, export = run, run.parents[1] / "export"
    else:
        _, model = saved_model(kind.split()[0], tmp_path / "model", dataset)
        if "begin" in kind:
            with_begin_of_text(model)
        export = model
    (mine, my_results), (other, other_results) = (
        samples(each, tasks, list(TASKS)) for each in (ours(model), theirs(export))
    )
    for name in ("pick", "texts", "last"):
        assert numbers(mine[name]) == pytest.approx(numbers(other[name]), abs=1e-4, rel=1e-6)
    assert mine["write"] == other["write"]
    assert kind == "run" or len({str(text) for text in mine["write"]}) > 4
    for name in TASKS:
        pairs = {k: v for k, v in my_results[name].items() if isinstance(v, float)}
        assert pairs == pytest.approx({k: other_results[name][k] for k in pairs}, rel=1e-3)


def test_chat_equals_the_backend_for_transformers(tasks: Path, dataset: Path, tmp_path: Path):
    _, model = saved_model("gpt2", tmp_path / "model", dataset)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}[answer]{% endif %}"
    )
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    how = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    mine, other, plain = (
        samples(each, tasks, ["pick", "write"], **more)[0]
        for each, more in ((ours(model, chat=True), how), (theirs(model), how), (theirs(model), {}))
    )
    assert mine["write"] == other["write"] != plain["write"]
    assert numbers(mine["pick"]) == pytest.approx(numbers(other["pick"]), abs=1e-4, rel=1e-6)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(kind, {}, each, number, ("task", number, 1))  # type: ignore[arg-type]
        for number, each in enumerate(arguments)
    ]


def test_odd_requests(run: Path):
    """No context, spaces at a context's end, special tokens, more than the model's context."""
    mine, other = ours(run, batch_size=2), theirs(run.parents[1] / "export")
    long = "You may copy and distribute the Work. " * 9
    pairs = [("", "The"), ("The ", "end"), ("A<|endoftext|>B", " C"), (long, "next one")]
    pairs += [("<|endoftext|>", "<|endoftext|>"), ("", "<|endoftext|> x")]
    asked = requests("loglikelihood", *pairs)
    assert numbers(mine.loglikelihood(asked)) == pytest.approx(
        numbers(other.loglikelihood(asked)), abs=1e-4
    )
    asked = requests("loglikelihood_rolling", (long * 3,), ("a",), ("",), ("<|endoftext|>é",))
    assert mine.loglikelihood_rolling(asked) == pytest.approx(
        other.loglikelihood_rolling(asked), abs=1e-3
    )
    settings = {"until": ["zzz"], "max_gen_toks": 20, "do_sample": False}
    penalty = settings | {"repetition_penalty": 1.3}
    prompts = [(text, how) for text in (long, "The", "if\n") for how in (settings, penalty)]
    asked = requests("generate_until", *prompts)
    assert mine.generate_until(asked) == other.generate_until(asked)
    assert mine.generate_until([]) == []


def test_more_new_tokens_than_the_context(run: Path, capsys: pytest.CaptureFixture[str]):
    sampled = {"max_gen_toks": 64, "do_sample": True, "temperature": 1.0, "num_beams": 2}
    texts = ours(run).generate_until(requests("generate_until", ("The", sampled)))
    assert texts[0]
    warnings = capsys.readouterr().err
    assert "asks for 64 new tokens, and the model's context is 64: only 32 are" in warnings
    assert "num_beams is not supported" in warnings


def test_command(run: Path, tasks: Path):
    left = set(run.parents[1].rglob("*"))
    done = minigpt("eval", run, "--tasks", "mine,write", "--tasks-dir", tasks, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {key: result[key] for key in ("model", "dtype", "limit", "chat")} == {
        "model": str(run), "dtype": "fp32", "limit": None, "chat": False,
    }  # fmt: skip
    assert result["checkpoint"] == str(run / "checkpoints/step-00000012")
    _, expected = samples(theirs(run.parents[1] / "export"), tasks, ["mine", "write"])
    pick, texts, write = (result["tasks"][name] for name in ("pick", "texts", "write"))
    assert pick["metrics"]["acc"]["value"] == pytest.approx(expected["pick"]["acc,none"])
    assert pick["metrics"]["acc"]["stderr"] > 0
    assert pick["metrics"]["acc"]["higher_is_better"] is True
    assert (pick["samples"], pick["num_fewshot"], pick["version"]) == (12, 1, 2.0)
    perplexity = texts["metrics"]["word_perplexity"]
    assert perplexity["value"] == pytest.approx(expected["texts"]["word_perplexity,none"], rel=1e-4)
    assert perplexity["stderr"] is None
    assert texts["version"] is None
    assert write["metrics"].keys() == {"exact_match"}
    assert result["groups"]["mine"]["metrics"]["acc"]["value"] == pytest.approx(
        expected["pick"]["acc,none"]
    )
    assert set(run.parents[1].rglob("*")) == left

    shown = finished("eval", run, "--tasks", "pick", "--tasks-dir", tasks, "--limit", "3",
                     "--num-fewshot", "0")  # fmt: skip
    heading, _, acc, norm = shown.splitlines()
    assert heading.split() == ["task", "metric", "value", "stderr", "better", "samples", "shots"]
    assert acc.split()[-3:] == norm.split()[-3:] == ["higher", "3", "0"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("process_docs: !function evil.run", ":12: runs Python code (!function evil.run)"),
        ("metric_list: [{metric: ./evil}]", ":12: loads the metric ./evil as Python code"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "runs Python code (hf_evaluate)"),
        ("include: part.yaml", "part.yaml:1: runs Python code"),
        ("use_prompt: x.yaml:y", "uses use_prompt"),
        ("dataset_kwargs: {cache_dir: /}", "uses cache_dir"),
        ("doc_to_text: '{{().__class__.__base__.__subclasses__()}}'", "access to attribute"),
    ],
)
def test_a_received_task_runs_no_code(tasks: Path, tmp_path: Path, text: str, part: str):
    folder = tmp_path / "received"
    shutil.copytree(tasks, folder)
    (folder / "part.yaml").write_text("process_docs: !function evil.run\n")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nrun = None\n")
    head = DATA.format(name="theirs", folder=folder)
    (folder / "theirs.yaml").write_text(
        head + "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        + ("" if text.startswith("doc_to_text") else "doc_to_text: question\n") + text + "\n"
    )  # fmt: skip
    with pytest.raises(UserError) as caught:  # noqa: SIM117
        with loaded_tasks(find_tasks(["theirs"], folder, trust=False)):
            pass
    assert part in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert find_tasks(["pick"], folder, trust=False).names == ["pick"]  # not about this one


def test_a_trusted_task_runs_its_code(tasks: Path, tmp_path: Path):
    folder = tmp_path / "own"
    shutil.copytree(tasks, folder)
    (folder / "own.py").write_text("def two(docs):\n    return docs.select(range(2))\n")
    with (folder / "pick.yaml").open("a") as file:
        file.write("process_docs: !function own.two\n")
    with loaded_tasks(find_tasks(["pi*"], folder, trust=True)) as loaded:
        assert len(loaded["tasks"]["pick"].eval_docs) == 2


def test_what_is_refused(run: Path, tasks: Path, tmp_path: Path):
    (tmp_path / "torn.yaml").write_text("task: [torn\n")
    (tmp_path / "gone.yaml").write_text(DATA.format(name="gone", folder=tmp_path))
    own = ("--tasks-dir", tmp_path)
    refused(2, "--tasks-dir nowhere: no such directory", "eval", run, "--tasks", "a",
            "--tasks-dir", "nowhere")  # fmt: skip
    refused(2, "task gone: FileNotFoundError: Unable to find", "eval", run, "--tasks", "gone", *own)
    refused(2, "names no task; give NAME,NAME", "eval", run, "--tasks", " , ", *own)
    with pytest.raises(UserError, match=r"torn.yaml: is not YAML: line 2: did not find expected"):
        _compose(tmp_path / "torn.yaml")
    part = "--tasks hellaswagg: no such task, neither in"
    refused(2, part, "eval", run, "--tasks", "texts,hellaswagg", "--tasks-dir", tasks)
