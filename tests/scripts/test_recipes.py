"""The recipes of scripts/README.md: each is run as it stands there, and does what it says."""

import functools
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import Subset

import accel_trainer.view.reporter as reporter
from accel_trainer import Callback, History, Trainer
from accel_trainer.view.report import runs_in
from support import ROOT, on_processes, run_here

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

SECTION = (ROOT / "scripts" / "README.md").read_text().partition("\n## Recipes\n")[2]
PARTS = [part.partition("\n") for part in ("Names\n" + SECTION).split("\n### ")]
CODE = {title: re.search(r"```\w+\n(.*?)```", text, re.DOTALL)[1] for title, _, text in PARTS}


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    """Draw no pictures: they take longer than the runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reporter, "draw_losses", lambda path, *_, **__: path.write_bytes(b""))


def run(code, **names):
    with open("recipe.py", "w") as file:
        file.write(code)
    return {name: value for name, value in runpy.run_path("recipe.py", names).items() if not name.startswith("__")}


@functools.cache
def common():
    return run(CODE["Names"])


def recipe(title, *changes, **names):
    """Run a recipe as it is, but for some names and pieces of its code; return its names."""
    code = CODE[title]
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    return run(code, **(common() | names))


def test_each_recipe_is_short_and_has_a_test():
    tested = " ".join(path.replace("_", " ") for path in globals() if path.startswith("test_"))
    for title, code in CODE.items():
        assert len(code.strip().splitlines()) <= 30, title
        assert title == "Names" or re.split("[ -]", title.lower())[0] in tested, title


def test_k_fold_has_no_leak():
    loaders = []

    class Records(Trainer):
        def fit(self, train_loader, test_loader):
            loaders.append([train_loader, test_loader])
            return super().fit(train_loader, test_loader)

        def evaluate(self, loader):
            loaders[-1].append(loader)
            return super().evaluate(loader)

    pixels = common()["pixels"].clone()
    pixels[:, 0] = torch.linspace(0, 1, len(pixels))  # tells the row, and after a common scaling still their order
    found = recipe("K-fold", ("num_epochs=20", "num_epochs=4"), pixels=pixels, Trainer=Records)
    finals = []
    for fold in loaders:
        inputs = [loader.dataset.tensors[0] for loader in fold]
        rows = torch.cat(inputs)[:, 0].argsort().argsort().split([len(part) for part in inputs])
        assert torch.cat(rows).sort().values.tolist() == list(range(1797))  # no row is in two parts
        known = pixels[rows[0]]
        expected = (pixels[rows[2]] - known.mean(dim=0)) / (known.std(dim=0) + 0.1)  # of the train rows only
        torch.testing.assert_close(inputs[2], expected, rtol=1e-4, atol=1e-4)
        finals.append(rows[2])
    assert len(loaders) == 5 and torch.cat(finals).sort().values.tolist() == list(range(1797))
    assert found["mean"] > 0.9 and len(runs_in("runs")) == 5


def losses_at(learning_rate, optimizer):
    names = common()
    model = names["make_model"]()
    trainer = Trainer(
        model,
        optimizer(model.parameters(), lr=learning_rate),
        names["loss_fn"],
        config=names["TrainConfig"](num_epochs=3, verbose=False),
    )
    return min(trainer.fit(names["DataLoader"](names["train_data"], 64, shuffle=True)).train_losses)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_the_learning_rate_finder_finds_one_that_learns_better_than_far_lower_and_higher_ones(optimizer):
    found = recipe("Learning-rate finder", ("AdamW", optimizer))
    assert found["trainer"].history.stop_reason.startswith("the loss has exploded") or found["LAST"] == 10.0
    make = getattr(torch.optim, optimizer)
    lower, best, higher = (losses_at(found["learning_rate"] * factor, make) for factor in (1 / 30, 1, 100))
    assert best < lower and (best < higher or math.isnan(higher))


def test_optuna_prunes_and_the_runs_say_so():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = recipe("Optuna with pruning", ("n_trials=12", "n_trials=9"), ("num_epochs=10", "num_epochs=4"))["study"]
    states = {run.name: run for run in runs_in("runs")}
    pruned = [trial.number for trial in study.trials if trial.state == optuna.trial.TrialState.PRUNED]
    assert 2 <= len(pruned) <= 6 and min(pruned) >= 3
    for trial in study.trials:
        record = states[f"trial_{trial.number}"]
        if trial.number in pruned:
            assert record.state == record.outcome == "pruned" and record.history.num_epochs < 4
        else:
            assert record.state == "finished" and trial.value == min(record.history.test_losses)
    assert study.best_value == min(trial.value for trial in study.trials if trial.number not in pruned)


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_lora_trains_adapters_and_heads_only_and_they_come_back():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layers": 2, "dim": 32, "hidden_dim": 32, "n_heads": 2, "max_position_embeddings": 8}
    config = transformers.DistilBertConfig(vocab_size=20, num_labels=2, **sizes)
    model = transformers.DistilBertForSequenceClassification(config)
    model.save_pretrained("distilbert-base-uncased")
    rows = [{"input_ids": torch.randint(2, 20, (8,)), "labels": torch.tensor(row % 2)} for row in range(64)]
    for row in rows:
        row["input_ids"][3] = row["labels"]  # what there is to learn
    loaders = {name: torch.utils.data.DataLoader(rows, batch_size=8) for name in ("train_loader", "test_loader")}
    found = recipe("LoRA fine-tuning", ("lr=1e-3", "lr=2e-2"), ("num_epochs=5", "num_epochs=12"), **loaders)
    assert found["trainer"].history.test_losses[-1] < 0.4
    before = model.state_dict()
    after = found["model"].get_base_model().state_dict()
    kept = [name for name in before if name in after or name.replace("lin.", "lin.base_layer.") in after]
    for name in kept:
        assert torch.equal(before[name], after.get(name, after.get(name.replace("lin.", "lin.base_layer."))))
    assert len(kept) == len(before) - 4  # all but the two heads, which have a copy that is trained
    again = transformers.AutoModelForSequenceClassification.from_pretrained("distilbert-base-uncased")
    again = peft.PeftModel.from_pretrained(again, "runs/lora/adapter").eval()
    batch = {"input_ids": torch.stack([row["input_ids"] for row in rows])}
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, found["model"].eval()(**batch).logits)


def test_balanced_sampling_draws_each_class_equally_often():
    data, counts = common()["train_data"], torch.zeros(10)
    labels = torch.tensor([int(label) for _, label in data])
    rare = (labels == 3).nonzero().flatten()[:9].tolist()
    others = (labels != 3).nonzero().flatten().tolist()

    def loss_fn(outputs, targets):
        if torch.is_grad_enabled():
            counts.add_(targets.bincount(minlength=10))
        return nn.functional.cross_entropy(outputs, targets)

    recipe("Balanced sampling", train_data=Subset(data, rare + others), loss_fn=loss_fn)
    assert counts.sum() == 10 * len(rare + others)
    assert ((counts / counts.sum() - 0.1).abs() < 0.015).all(), counts


def test_warm_up_and_cosine_reach_the_peak_and_nearly_zero():
    found = recipe("Warm-up and cosine")
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler, rates = found["warm_up_and_cosine"](optimizer, 230), []
    for _ in range(230):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:24] == pytest.approx([*(step / 23 for step in range(1, 24)), 1.0])
    assert rates[22] == max(rates) == 1.0 and rates[22:] == sorted(rates[22:], reverse=True)
    assert rates[126] == pytest.approx(0.5, abs=0.01) and 0 < rates[-1] < 1e-3
    assert found["trainer"].history.learning_rates == pytest.approx(
        [rates[23 * epoch - 1] * 0.01 for epoch in range(1, 11)]
    )
    for num_steps in (1, 2):
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        scheduler = found["warm_up_and_cosine"](optimizer, num_steps)
        for _ in range(num_steps):
            assert optimizer.param_groups[0]["lr"] == 1.0
            optimizer.step()
            scheduler.step()


def test_averaged_weights_are_smoother_than_the_last(capsys):
    found = recipe("Averaged weights (EMA)", ("num_epochs=10", "num_epochs=4"))
    plain = recipe("Averaged weights (EMA)", ("num_epochs=10", "num_epochs=4"), ("[average]", "[]"))
    averaged, last = (one["history"].test_losses for one in (found, plain))
    assert found["history"].train_losses == plain["history"].train_losses and averaged != last
    assert averaged == sorted(averaged, reverse=True)
    assert f"averaged weights: {min(averaged):.4f}" in capsys.readouterr().out


def test_overfit_one_batch_tells_a_sound_model_from_one_that_does_not_learn(capsys):
    recipe("Overfit one batch")
    assert "learned by heart {'loss': 0.0" in capsys.readouterr().out
    recipe("Overfit one batch", ("lr=1e-2", "lr=0.0"), ("num_epochs=100", "num_epochs=2"))
    assert "something is wrong {'loss': 2." in capsys.readouterr().out


def test_profile_writes_a_trace_of_three_steps(capsys):
    recipe("Profile some steps")
    with open("trace_0.json") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#7", "ProfilerStep#8", "ProfilerStep#9"}
    assert names.count("Optimizer.step#AdamW.step") == 3 and names.count("aten::addmm") == 6
    assert "Self CPU time total" in capsys.readouterr().out


def test_gradual_unfreezing_trains_one_layer_more_every_second_epoch():
    changed = []

    class Looks(Trainer):
        def __init__(self, model, *arguments, callbacks, **more):
            super().__init__(model, *arguments, callbacks=[*callbacks, Look()], **more)

    class Look(Callback):
        def on_fit_start(self, trainer):
            self.before = [parameter.clone() for parameter in trainer.model.parameters()]

        def on_epoch_end(self, trainer):
            now = [parameter.detach().clone() for parameter in trainer.model.parameters()]
            changed.append([not torch.equal(*pair) for pair in zip(now, self.before, strict=True)])
            self.before = now

    recipe("Gradual unfreezing", Trainer=Looks)
    assert changed == [[False, False, True, True]] * 2 + [[True] * 4] * 4


def test_mixup_mixes_inputs_and_classes_alike_and_the_loss_with_them():
    losses = []

    def loss_fn(outputs, targets):
        loss = nn.functional.cross_entropy(outputs, targets)
        if targets.ndim == 2:  # shares of classes
            shares, classes = targets.topk(2, dim=1)
            each = [nn.functional.cross_entropy(outputs, classes[:, place], reduction="none") for place in range(2)]
            losses.append(((each[0] * shares[:, 0] + each[1] * shares[:, 1]).mean().item(), loss.item()))
        return loss

    found = recipe("Mixup", ("num_epochs=10", "num_epochs=2"), loss_fn=loss_fn)
    assert len(losses) == 2 * 2 * 23  # micro-batches; the probe of the first step looks at others
    mixed, plain = map(torch.tensor, zip(*losses, strict=True))
    torch.testing.assert_close(mixed, plain)
    model, (inputs, labels) = found["model"], zip(*common()["test_data"], strict=True)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(torch.stack(inputs)), torch.stack(labels))
    assert found["trainer"].history.best_value == pytest.approx(loss.item(), rel=1e-5)

    data = [(torch.eye(10)[place], torch.tensor(place)) for place in range(10)]  # inputs that tell what is mixed
    mixes = [found["Mixup"](data, 10, alpha=1.0)[place % 10] for place in range(400)]
    for place, (mixture, shares) in enumerate(mixes):
        torch.testing.assert_close(mixture, shares)
        assert shares.sum() == pytest.approx(1) and (shares > 0).sum() <= 2 and shares[place % 10] > 0
    torch.manual_seed(5)
    mixture, shares = found["Mixup"]([(inputs, int(target)) for inputs, target in data], 10)[3]
    torch.testing.assert_close(mixture, shares)
    own = torch.stack([shares[place % 10] for place, (_, shares) in enumerate(mixes) if shares.max() < 1])
    assert own.mean() == pytest.approx(0.5, abs=0.05) and own.std() == pytest.approx(12**-0.5, abs=0.04)  # uniform


def test_distillation_matches_each_sample_with_what_the_large_model_says_of_it():
    found = recipe("Distillation", ("num_epochs=20", "num_epochs=10"))
    for name in ("train_data", "test_data"):
        stacked, data = found["stacked"](common()[name]), common()[name]
        for place in (0, 7, len(data) - 1):
            inputs, (label, wanted) = stacked[place]
            assert torch.equal(inputs, data[place][0]) and label == data[place][1]
            torch.testing.assert_close(wanted, found["large"](inputs).detach(), rtol=1e-4, atol=1e-4)
    inputs, (label, _) = found["stacked"]([(one, int(target)) for one, target in Subset(data, range(3))])[2]
    assert torch.equal(inputs, data[2][0]) and label == data[2][1]
    outputs, wanted = torch.randn(4, 10), torch.randn(4, 10)
    classes = torch.arange(4)
    wants, has = (wanted / 3).softmax(1), (outputs / 3).softmax(1)
    hard = -outputs.log_softmax(1)[torch.arange(4), classes].mean()
    expected = 0.5 * hard + 4.5 * (wants * (wants / has).log()).sum(1).mean()
    torch.testing.assert_close(found["distillation"](outputs, (classes, wanted)), expected)
    assert found["trainer"].history.metrics["accuracy"][-1] > 0.9


SAME = ("Learning-rate finder", "Balanced sampling", "Gradual unfreezing", "Mixup", "Distillation")
SHORTER = {
    "Learning-rate finder": [("NUM_STEPS = 1e-6, 10.0, 150", "NUM_STEPS = 1e-6, 10.0, 50")],
    "Balanced sampling": [("num_epochs=10", "num_epochs=1")],
    "Mixup": [("num_epochs=10", "num_epochs=2")],
    "Distillation": [("num_epochs=10", "num_epochs=2"), ("num_epochs=20", "num_epochs=2")],
}


def run_all():
    os.makedirs(str(os.getpid()))
    os.chdir(str(os.getpid()))
    found = [recipe(title, *SHORTER.get(title, ())) for title in SAME]
    return [one["trainer"].history.train_losses for one in found]


@pytest.mark.distributed
def test_recipes_give_the_same_on_two_processes():
    (one,), (two, other) = on_processes(1, run_all), on_processes(2, run_all)
    for title, losses, again in zip(SAME, one, two, strict=True):
        assert losses == pytest.approx(again, rel=1e-3), title
    assert one[3] == two[3] and two == other  # mixup: the same bits


# --- clusters ---------------------------------------------------------------------------------------------------------


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
echo $$ > pid.part && mv pid.part srun.pid
greatest=0
for pid in "${pids[@]}"; do
    wait $pid; code=$?
    while kill -0 $pid 2> /dev/null; do wait $pid; code=$?; done
    ((code > greatest)) && greatest=$code
done
exit $greatest
"""
SCONTROL = """#!/bin/bash
if [ $1 = show ]; then echo localhost; else echo "$@" >> asked; fi
"""
OPTIONS_OF_SBATCH = "job-name nodes ntasks-per-node gpus-per-node cpus-per-task time signal requeue open-mode".split()
TRAIN = """
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
from accel_trainer import TrainConfig, Trainer

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
files = {"run_dir": options["--run_dir"], "resume": options["--resume"]}
config = TrainConfig(num_epochs=int(options["--num_epochs"]), **files)
torch.manual_seed(0)
model = torch.nn.Linear(1, 1)
trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.01), torch.nn.MSELoss(), config=config)
trainer.fit(DataLoader(TensorDataset(torch.ones(64, 1), torch.ones(64, 1)), batch_size=16))
"""


@pytest.mark.distributed
def test_slurm_requeues_what_a_signal_has_ended_and_only_that(tmp_path, monkeypatch):
    """With an srun that starts the tasks here, and passes the signal on to them as SLURM does."""
    code = CODE["SLURM that requeues itself"]
    assert re.findall(r"^#SBATCH --([\w-]+)", code, re.MULTILINE) == OPTIONS_OF_SBATCH
    assert subprocess.run(["bash", "-n"], input=code, text=True).returncode == 0
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("job.sh", code), ("scripts/train.py", TRAIN)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.path.dirname(sys.executable), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    job = {"NTASKS": "2", "JOB_ID": "7", "JOB_NAME": "digits", "JOB_NODELIST": "here", "CPUS_PER_TASK": "1"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    process = subprocess.Popen(["bash", "job.sh"])
    history = tmp_path / "runs/digits/history.jsonl"
    while not (history.exists() and history.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
    assert process.wait(30) == 143
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert json.loads((tmp_path / "runs/digits/preempted.json").read_text())["is_saved"]
    for code in (0, 1):
        (tmp_path / "python").write_text(f"#!/bin/bash\nexit {code}\n")
        (tmp_path / "python").chmod(0o755)
        assert subprocess.run(["bash", "job.sh"]).returncode == code
    assert (tmp_path / "asked").read_text() == "requeue 7\n" and History.load("runs/digits").num_epochs > 0


def test_kubernetes_starts_one_process_per_pod_and_restarts_what_a_signal_has_ended(monkeypatch, capsys):
    """Its fields were compared once with the schema of JobSet v1alpha2."""
    content = yaml.safe_load(CODE["Kubernetes JobSet"])
    assert (content["apiVersion"], content["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, (worker,) = content["metadata"]["name"], content["spec"]["replicatedJobs"]
    job = worker["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    slurm = CODE["SLURM that requeues itself"]
    needed = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    assert environment.keys() == needed and all(f"{one}=" in slurm for one in needed)
    assert job["parallelism"] == job["completions"] == int(environment["WORLD_SIZE"])
    assert environment["MASTER_ADDR"] == f"{name}-{worker['name']}-0-0.{name}"
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [143]}
    (restarts,) = content["spec"]["failurePolicy"]["rules"]
    assert restarts["onJobFailureReasons"] == ["PodFailurePolicy"] and rule["action"] == "FailJob"
    python, script, *options = container["command"]
    assert python == "python" and 'scripts/train.py "$@"\'' in slurm
    for given in (options, "--run_dir runs/x --resume auto --num_epochs 1000".split()):
        code, printed = run_here(monkeypatch, capsys, str(ROOT / script), *given, "--print_config")
        assert code == 0 and "resume: auto" in printed
    assert 'train --run_dir "runs/$SLURM_JOB_NAME" --resume auto --num_epochs 1000' in slurm
