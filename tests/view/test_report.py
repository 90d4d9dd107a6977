"""The page of a run: its numbers, in a real browser; the comparison; the list of runs; the picture."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from PIL import Image
from torch import nn

from accel_trainer import Callback, History, Loss, ProcessFailedError, Trainer
from accel_trainer.devices import board
from accel_trainer.storage.saver import finish_writes
from accel_trainer.tools.cli import main
from accel_trainer.view.report import LivePage, RunFiles, render, runs_in
from accel_trainer.view.reporter import Reporter
from accel_trainer.view.sections import number
from support import correct, loader_of, make_data, make_model, on_processes, quiet, run_forked


def fit(run_dir, callbacks=(), lr=0.02, **choices):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    config = quiet(**{"num_epochs": 3, "max_grad_norm": 1.0, "run_dir": run_dir, **choices})
    metrics = {"accuracy": correct}
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics=metrics, callbacks=callbacks, config=config)
    trainer.fit(loader_of(make_data(64), 16), loader_of(make_data(20), 8))
    return trainer


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_has_the_numbers_of_the_history_and_the_evaluation(tmp_path):
    trainer = fit(tmp_path / "run")
    scores = trainer.evaluate(loader_of(make_data(11), 4))
    page = (tmp_path / "run/report.html").read_text()
    history, data = History.load(tmp_path / "run"), data_of(page)
    curves = curves_of(data)
    assert curves["train loss"] == history.train_losses and curves["test loss"] == history.test_losses
    assert curves["accuracy"] == history.metrics["accuracy"]
    assert curves["gradient norm before clipping"] == history.grad_norms
    assert not {"throughput", "compute"} & set(curves)  # nobody asks where the time of a second went
    assert data["charts"][0]["series"][1]["best"] == history.best_epoch
    rows = {name: [row[place] for row in data["table"]["rows"]] for place, name in enumerate(data["table"]["header"])}
    assert [float(text) for text in rows["test_loss"]] == history.test_losses
    assert number(scores["loss"]) in page and "11 samples" in page and "all 3 epochs done" in page
    assert "finished" in page and not data["is_running"]
    assert torch.__version__ in page and "max_grad_norm" in page
    assert "Layers of the model (3, 75 parameters)" in page and "<th>weight_decay</th><td>0.01</td>" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)


def curves_of(data):
    return {one["label"]: one["values"] for chart in data["charts"] for one in chart["series"]}


def test_metrics_of_the_training_and_values_by_index_are_shown(tmp_path):
    def compute_loss(model, batch):
        outputs = model(batch[0])
        loss = nn.functional.cross_entropy(outputs, batch[1])
        return Loss(loss, None, outputs, batch[1], {"size": outputs.square().mean()})

    model = make_model()
    recalls = {"recall": lambda outputs, targets: [0.25, 0.5, float(len(targets))]}
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        compute_loss=compute_loss,
        whole_metrics=recalls,
        config=quiet(run_dir=tmp_path / "run", num_epochs=2),
    )
    history = trainer.fit(loader_of(make_data(16), 8), loader_of(make_data(12), 8))
    trainer.evaluate(loader_of(make_data(9), 8))
    page = (tmp_path / "run/report.html").read_text()
    charts = {chart["title"]: chart for chart in data_of(page)["charts"]}
    shown = {one["label"]: one["values"] for one in charts["size"]["series"]}
    assert shown == {"train size": history.train_metrics["size"], "size": history.metrics["size"]}
    assert not any("recall" in title for title in charts)
    table = re.search(r"<summary>recall</summary>(.*?)</table>", page, re.DOTALL)[1]
    cells = re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", table)
    best = f"best epoch ({history.best_epoch})"
    rows = [("0", *["0.2500"] * 3), ("1", *["0.5000"] * 3), ("2", "12.00", "12.00", "9.000")]
    assert cells == ["index", best, "last epoch", "evaluation: final", *(cell for row in rows for cell in row)]
    assert "recall/0" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL).partition("Config")[0]


def test_scores_of_several_test_sets_share_a_chart(tmp_path):
    model = make_model()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        metrics={"accuracy": correct},
        whole_metrics={"recall": lambda outputs, targets: [0.25, float(len(targets))]},
        config=quiet(run_dir=tmp_path / "run", num_epochs=2),
    )
    tests = {"val": loader_of(make_data(12), 8), "ood": loader_of(make_data(9), 8)}
    history = trainer.fit(loader_of(make_data(16), 8), tests)
    page = (tmp_path / "run/report.html").read_text()
    charts = {chart["title"]: chart for chart in data_of(page)["charts"]}
    for title, score in (("Loss of each test set", "loss"), ("accuracy", "accuracy")):
        shown = {one["label"]: one["values"] for one in charts[title]["series"]}
        assert shown == {f"{name}/{score}": history.metrics[f"{name}/{score}"] for name in ("val", "ood")}
    cells = re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", re.search(r">recall</summary>(.*?)</table>", page, re.DOTALL)[1])
    best = f"best epoch ({history.best_epoch})"
    assert cells[:5] == ["index", f"val, {best}", "val, last epoch", f"ood, {best}", "ood, last epoch"]
    assert cells[-5:] == ["1", "12.00", "12.00", "9.000", "9.000"]


def test_a_long_run_tells_where_its_time_went(tmp_path):
    fit(tmp_path / "run")
    record = RunFiles.load(tmp_path / "run")
    record.history.epoch_seconds[:] = [30.0, 20.0, 15.0]
    curves = curves_of(data_of(render([record])))
    assert curves["throughput"] == record.history.samples_per_second
    assert curves["compute"] == record.history.compute_seconds


def test_the_data_of_an_evaluation_have_a_name_and_the_page_says_which_chose_the_epoch(tmp_path):
    model, data = make_model(), make_data(64)
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters()), nn.CrossEntropyLoss(), config=quiet(run_dir=tmp_path / "run")
    )
    test = make_data(20)
    trainer.fit(loader_of(data), loader_of(test))
    for loader, name in ((loader_of(data), None), (loader_of(test, 5), None), (loader_of(make_data(11)), None)):
        trainer.evaluate(loader, name=name)
    trainer.evaluate(loader_of(make_data(12)), name="next year")
    kept = json.loads((tmp_path / "run/evaluations.json").read_text())
    assert [one["data"] for one in kept] == ["train", "test", "final", "next year"]
    page = (tmp_path / "run/report.html").read_text()
    assert "The test data chose the best epoch" in page and "<th>next year</th>" in page
    alone = Trainer(
        model, torch.optim.SGD(model.parameters()), nn.CrossEntropyLoss(), config=quiet(run_dir=tmp_path / "alone")
    )
    alone.fit(loader_of(data))
    alone.evaluate(loader_of(test))
    page = (tmp_path / "alone/report.html").read_text()
    assert "The test data chose" not in page and "<th>final</th>" in page


def test_evaluations_are_kept_once_each_and_only_after_a_fit_with_a_run_dir(tmp_path):
    trainer = fit(tmp_path / "run")
    for size in (11, 5, 11):
        trainer.evaluate(loader_of(make_data(size), 4))
    kept = json.loads((tmp_path / "run/evaluations.json").read_text())
    assert [one["num_samples"] for one in kept] == [5, 11]
    fit(None).evaluate(loader_of(make_data(5), 4))
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


class Peek(Callback):
    """Keep the page as it is at the start and after each epoch."""

    def __init__(self, run_dir):
        self.path, self.pages = run_dir / "report.html", []

    def on_fit_start(self, trainer):
        self.pages.append(self.path.read_text())

    def on_epoch_end(self, trainer):
        self.pages.append(self.path.read_text())


def test_the_page_can_be_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(LivePage, "_SHARE", float("inf"))
    peek = Peek(tmp_path / "run")
    fit(tmp_path / "run", [peek])
    for done, page in enumerate(peek.pages):
        data = data_of(page)
        assert data["is_running"] and len(data["table"]["rows"]) == done
        assert f"{done} of 3 epochs done" in page


def test_short_epochs_go_by_unwritten_so_that_the_page_costs_nothing(tmp_path, monkeypatch):
    written = []
    original = LivePage.write
    monkeypatch.setattr(LivePage, "write", lambda page, state: written.append(state) or original(page, state))
    fit(tmp_path / "run", num_epochs=40)
    assert written[0] == "running" and written[-1] == "finished" and len(written) < 20
    assert len(data_of((tmp_path / "run/report.html").read_text())["table"]["rows"]) == 40


class Boom(Callback):
    def on_epoch_end(self, trainer):
        raise RuntimeError("boom")


def test_an_error_ends_the_page_too_and_a_file_that_makes_no_sense_is_no_error_of_the_training(tmp_path):
    with pytest.raises(RuntimeError, match="boom"):
        fit(tmp_path / "run", [Boom()])
    page = (tmp_path / "run/report.html").read_text()
    assert "failed" in page and not data_of(page)["is_running"] and len(data_of(page)["table"]["rows"]) == 1
    trainer = fit(tmp_path / "other")
    (tmp_path / "other/evaluations.json").write_text("nonsense")
    with pytest.warns(UserWarning, match="evaluations.json"):
        assert trainer.evaluate(loader_of(make_data(11), 4))["loss"] > 0


class TrialPruned(Exception):
    """As Optuna's is called."""


class Raises(Callback):
    def __init__(self, error):
        self.error = error

    def on_epoch_end(self, trainer):
        if trainer.state.epoch == 2:
            raise self.error


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


SAID = {
    "error": (ValueError("no such\nsample"), "failed", "failed: ValueError: no such"),
    "without words": (ZeroDivisionError(), "failed", "failed: ZeroDivisionError"),
    "secret": (OSError("https://me:pass@host"), "failed", "failed: OSError: https://***@host"),
    "pruned": (TrialPruned("at epoch 2"), "pruned", "pruned: at epoch 2"),
    "no text": (Unspeakable(), "failed", "failed: Unspeakable: (its text cannot be had: RuntimeError)"),
    "end asked for": (SystemExit(0), "interrupted", "interrupted: the program asked to end"),
    "half a letter": (ValueError("\ud800!"), "failed", "failed: ValueError: ?!"),
    "exit": (SystemExit(3), "failed", "failed: SystemExit: 3"),
    "second Ctrl-C": (KeyboardInterrupt(), "interrupted", "interrupted"),
}


@pytest.mark.parametrize("kind", SAID)
def test_what_has_ended_a_run_is_said_until_it_goes_on(tmp_path, kind):
    (error, state, reason), run_dir = SAID[kind], tmp_path / "run"
    with pytest.raises(type(error)) as raised:
        fit(run_dir, [Raises(error)])
    assert raised.value is error
    finish_writes()  # Ctrl-C leaves them to their thread, which holds the folder until then
    seen = run_forked(functools.partial(main, ["runs", str(tmp_path)]), "accel_trainer")
    assert re.search(rf"^run +{state} +2/3 .* {re.escape(reason)}$", seen.stdout, re.MULTILINE), seen
    assert (run_dir / "losses.png").stat().st_size > 1000  # of the two epochs
    note = (run_dir / "failed.json").read_text()
    (run_dir / "failed.json").write_text(note.replace(state, "finished"))
    with pytest.raises(ValueError, match="failed.json cannot be read: its checksum does not match"):
        RunFiles.load(run_dir)
    (run_dir / "failed.json").write_text(note)
    for page in ((run_dir / "report.html").read_text(), render([RunFiles.load(run_dir)])):
        assert f'<span class="state {state}">{state}</span> {reason}</p>' in page and "killed" not in page
    assert fit(run_dir, resume="auto").history.stop_reason == "all 3 epochs done"
    record = RunFiles.load(run_dir)
    assert (record.state, record.outcome) == ("finished", "all 3 epochs done") and not (
        run_dir / "failed.json"
    ).exists()


def test_an_error_after_the_end_or_before_anything_leaves_no_word(tmp_path):
    class Late(Callback):
        def on_fit_end(self, trainer):
            raise ValueError("late")

    class Early(Callback):
        def on_step_end(self, trainer):
            raise ValueError("early")

    with pytest.raises(ValueError, match="late"):
        fit(tmp_path / "late", [Late()])
    assert RunFiles.load(tmp_path / "late").outcome == "all 3 epochs done"
    with pytest.raises(ValueError, match="early"):
        fit(tmp_path / "early", [Early()])
    assert not (tmp_path / "early").exists()


def test_an_evaluation_that_fails_within_a_callback_is_no_end_of_the_run(tmp_path):
    class Tries(Callback):
        def on_epoch_end(self, trainer):
            with pytest.raises(TypeError):
                trainer.evaluate(None)
            if trainer.state.epoch == 3:
                raise ValueError("the end")

    with pytest.raises(ValueError, match="the end"):
        fit(tmp_path / "run", [Tries()])
    assert RunFiles.load(tmp_path / "run").outcome == "failed: ValueError: the end"


def test_a_word_that_cannot_be_left_hides_no_error(tmp_path, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no room")

    monkeypatch.setattr(Reporter, "report_failure", fails)
    with pytest.raises(RuntimeError, match="boom"):
        fit(tmp_path / "run", [Boom()])


class OnOneProcess(Callback):
    def on_epoch_end(self, trainer):
        if trainer.state.epoch == 2 and torch.distributed.get_rank() == 1:
            raise ValueError("no such sample")


def fail_on_one(run_dir, lives_on):
    try:
        fit(run_dir, [OnOneProcess()])
    except ValueError:
        if lives_on:  # its connections do not close: the main process waits for it, and is ended by its watch
            threading.Event().wait(20)
        torch.distributed.destroy_process_group()  # as an interpreter that ends: some time before it has ended
        threading.Event().wait(0.5)
        os._exit(3)
    except ProcessFailedError:
        os._exit(4)


@pytest.mark.distributed
@pytest.mark.parametrize("lives_on", [False, True])
def test_the_error_of_another_process_is_said_too(tmp_path, monkeypatch, capfd, lives_on):
    monkeypatch.setattr(board, "_GRACE_SECONDS", 0.2)
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        on_processes(2, fail_on_one, tmp_path / "run", lives_on)
    record = RunFiles.load(tmp_path / "run")
    told = "failed: Process 1 failed with ValueError: no such sample"
    assert (record.state, record.outcome) == ("failed", told) and told in (tmp_path / "run/report.html").read_text()


def test_a_disk_that_fails_and_a_nan_do_not_stop_the_page(tmp_path, monkeypatch):
    def fails(page, state):
        raise OSError("no room")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="no room"):
        patch.setattr(LivePage, "write", fails)
        assert fit(tmp_path / "full").history.num_epochs == 3
    record = RunFiles.load(tmp_path / "full")
    record.history.test_losses[1] = float("nan")
    page = render([record])
    assert data_of(page)["charts"][0]["series"][1]["values"][1] is None
    assert data_of(page)["table"]["rows"][1][2] == "nan"


def test_text_in_the_page_is_text(tmp_path):
    record = RunFiles("<script>x</script>", tmp_path, History([1.0], [2.0], stop_reason="</script><b>"), "finished")
    page = render([record])
    assert "<script>x" not in page and "</script><b>" not in page


# --- several runs -----------------------------------------------------------------------------------------------------


def test_report_compares_runs_and_says_what_differs(tmp_path, monkeypatch, capsys):
    fit(tmp_path / "one", seed=1).evaluate(loader_of(make_data(11), 4))
    fit(tmp_path / "two", seed=2, lr=0.01, num_epochs=2)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "one", "two"]) == 0
    assert capsys.readouterr().out == "report.html\n"
    page = (tmp_path / "report.html").read_text()
    charts = {chart["title"]: chart for chart in data_of(page)["charts"]}
    one, two = charts["Test loss"]["series"]
    assert one["values"] == History.load("one").test_losses
    assert two["values"] == [*History.load("two").test_losses, None]
    assert [cell for cell in re.findall(r"<th>seed</th><td>(.*?)</td><td>(.*?)</td>", page)] == [("1", "2")]
    assert re.search(r"<th>learning rates</th><td>0.02</td><td>0.01</td>", page)
    first, second = History.load("one"), History.load("two")
    assert "Results, and their differences to one, the baseline" in page
    assert "<th>epochs</th><td>3</td><td>2 (-1, -33.3\u00a0%)</td>" in page
    difference = second.best_value - first.best_value
    told = f"{number(second.best_value)} ({'-' if difference < 0 else '+'}{number(abs(difference))}, "
    told += f"{100 * difference / first.best_value:+.1f}\u00a0%)"
    assert f"<td>{number(first.best_value)}</td><td>{told}</td>" in page
    for equal in ("patience", "hardware", "run_dir"):  # the folder is the name of the run
        assert f"<th>{equal}</th>" not in page
    shutil.copytree("two", "other/two")
    assert main(["report", "two", "other/two"]) == 0
    assert "<title>two / other/two" in (tmp_path / "report.html").read_text()
    assert main(["report", "one"]) == 0 and main(["report", "three"]) == 2
    assert "No history.jsonl in" in capsys.readouterr().err


def test_runs_lists_what_is_in_a_folder(tmp_path, capsys):
    fit(tmp_path / "runs/good")
    fit(tmp_path / "runs/deep/other", num_epochs=2)
    path = tmp_path / "runs/deep/other/history.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # killed before the end
    (tmp_path / "runs/deep/junk").mkdir()
    (tmp_path / "runs/deep/junk/history.jsonl").write_text("nonsense\n")
    assert main(["runs", str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].split()[:2] == ["run", "state"]
    assert re.match(r"deep/other +broken +2/2 +\d +test_loss [\d.]+ +20\d\d-", lines[1])
    assert re.match(r"good +finished +3/3 .*all 3 epochs done$", lines[2])
    assert {record.state for record in runs_in(tmp_path)} == {"finished", "broken"}
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "There is no folder" in capsys.readouterr().err


class LooksAtItself(Callback):
    def on_epoch_end(self, trainer):
        command = [sys.executable, "-m", "accel_trainer", "runs", str(trainer.config.run_dir)]
        self.seen = subprocess.run(command, capture_output=True, text=True).stdout


def test_a_run_that_goes_on_is_seen_to_by_another_process(tmp_path):
    looks = LooksAtItself()
    fit(tmp_path / "run", [looks], num_epochs=1)
    assert " running " in looks.seen


# --- as it is seen ----------------------------------------------------------------------------------------------------


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_draws_it_without_errors_or_cuts(tmp_path, width, scheme):
    fit(tmp_path / "run").evaluate(loader_of(make_data(11), 4))
    page = tmp_path / "run/report.html"
    text = page.read_text()  # what the browser measures, at the end of the page
    probe = """<script>const cut = [...document.querySelectorAll("figure, header, .cards div")].filter(
        one => one.getBoundingClientRect().right > innerWidth + 1).length;
        document.getElementById("epochs").open = true;
        setTimeout(() => document.title = [document.querySelectorAll("canvas").length, cut,
            document.documentElement.scrollWidth - innerWidth,
            document.querySelectorAll("#epochs tbody tr").length].join(" "), 200);</script>"""
    page.write_text(text.replace("</body>", f"{probe}</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={scheme}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr, done.stderr
    canvases, cut, too_wide, rows = map(int, re.search(r"<title>(.*?)</title>", done.stdout)[1].split())
    assert (canvases, cut, rows) == (3, 0, 3) and too_wide <= 0


def test_the_picture_is_large_enough_for_paper(tmp_path):
    fit(tmp_path / "run")
    with Image.open(tmp_path / "run/losses.png") as picture:
        assert picture.width >= 1200
