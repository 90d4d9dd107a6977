"""Predictions of sequences of several lengths, and of models of transformers."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from accel_trainer import Trainer
from support import loader_of, make_data, make_model, on_processes, quiet

LENGTHS = [3, 1, 5, 2, 4, 6, 2]


def sequences(padded_on="right"):
    """Return samples of several lengths, and a collate function that pads each batch to its own longest."""
    samples = [torch.arange(1.0, length + 1) + 10 * index for index, length in enumerate(LENGTHS)]

    def collate(batch):
        masks = [torch.ones(len(one), dtype=torch.long) for one in batch]
        pad = {"batch_first": True, "padding_side": padded_on}
        return {
            "values": nn.utils.rnn.pad_sequence(batch, **pad),
            "attention_mask": nn.utils.rnn.pad_sequence(masks, **pad),
            "labels": torch.zeros(len(batch)),
        }

    return samples, collate


class Doubles(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, values, attention_mask):
        doubled = self.weight * values + 1  # also where there is padding
        return {"tokens": doubled[..., None].expand(-1, -1, 2), "first": doubled[:, 0], "pair": (doubled, None)}


def predicted(ragged, padded_on="right", num_micro_batches=None):
    samples, collate = sequences(padded_on)
    trainer = Trainer(Doubles(), None, nn.MSELoss(), config=quiet(num_micro_batches=num_micro_batches))
    found = trainer.predict(DataLoader(samples, batch_size=3, collate_fn=collate), ragged=ragged)
    return found if found is None else {"tokens": found["tokens"], "pair": found["pair"][0]}


@pytest.mark.parametrize("padded_on", ["right", "left"])
@pytest.mark.parametrize("num_micro_batches", [None, 2])
def test_lengths_are_kept_in_a_list_or_filled_up(padded_on, num_micro_batches):
    expected = [2 * one + 1 for one in sequences()[0]]
    found = predicted("list", padded_on, num_micro_batches)
    assert all(torch.equal(one, other) for one, other in zip(found["pair"], expected, strict=True))
    assert [tuple(one.shape) for one in found["tokens"]] == [(length, 2) for length in LENGTHS]
    found = predicted(-100, padded_on, num_micro_batches)
    assert torch.equal(found["pair"], nn.utils.rnn.pad_sequence(expected, batch_first=True, padding_value=-100.0))
    assert found["tokens"].shape == (7, 6, 2) and torch.equal(found["tokens"][..., 1], found["pair"])


@pytest.mark.distributed
def test_lengths_do_not_depend_on_the_number_of_processes():
    expected = predicted(0.0)
    found, nothing = on_processes(2, predicted, 0.0)
    assert nothing is None and all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_a_mask_each_sample_keeps_the_padding_of_its_batch():
    samples, collate = sequences()
    loader = DataLoader(samples, batch_size=3, collate_fn=lambda batch: collate(batch)["values"])
    model = nn.Identity()
    found = Trainer(model, None, nn.MSELoss(), config=quiet()).predict(loader, ragged="list")
    assert [len(one) for one in found] == [5, 5, 5, 6, 6, 6, 2]


class Classes(Doubles):
    def forward(self, values, attention_mask):
        return super().forward(values, attention_mask)["first"][:, None] + torch.arange(5.0)  # as many as five tokens


@pytest.mark.parametrize("ragged", [0.0, "list"])
def test_scores_of_classes_are_no_tokens(ragged):
    samples, collate = sequences()
    loader = DataLoader(samples, batch_size=3, collate_fn=collate)  # the first batch is five tokens long
    found = Trainer(Classes(), None, nn.MSELoss(), config=quiet()).predict(loader, ragged=ragged)
    assert [len(one) for one in found] == [5] * 7 and found[1][4] == 2 * 11.0 + 1 + 4


def test_a_number_that_fills_up_must_be_one_of_the_outputs():
    samples, collate = sequences()
    loader = DataLoader(samples, batch_size=3, collate_fn=lambda batch: collate(batch)["attention_mask"])
    trainer = Trainer(nn.Identity(), None, nn.MSELoss(), config=quiet())
    for wrong in (1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"ragged=.* cannot fill up outputs of torch.int64: give a whole number"):
            trainer.predict(loader, ragged=wrong)
    assert trainer.predict(loader, ragged=-1.0).tolist()[-1] == [1, 1, -1, -1, -1, -1]


def test_several_lengths_need_a_choice():
    with pytest.raises(
        ValueError, match=r"cannot be joined .* predict\(loader, ragged='list'\), or filled up by ragged"
    ):
        predicted(None)
    trainer = Trainer(make_model(), None, nn.MSELoss(), config=quiet())
    for wrong in ("pad", True, [0]):
        with pytest.raises(ValueError, match="ragged must be a number, 'list' or None, got"):
            trainer.predict(loader_of(make_data(4)), ragged=wrong)
    assert trainer.predict(loader_of(make_data(0), shuffle=False), ragged="list") is None


def test_a_cache_for_the_next_token_is_left_out_without_a_word():
    import transformers

    sizes = {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    tokens = torch.randint(1, 20, (5, 4), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": one, "labels": one} for one in tokens]
    found = Trainer(model, None, config=quiet()).predict(DataLoader(data, batch_size=2))
    assert list(found) == ["logits"]
    torch.testing.assert_close(found["logits"], model(tokens).logits.detach(), rtol=1e-4, atol=1e-6)


def fit_here(model, run_dir, data, **choices):
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    config = quiet(run_dir=run_dir, **choices)
    return Trainer(model, optimizer, config=config).fit(DataLoader(data, batch_size=4), DataLoader(data, batch_size=4))


def make_bert(transformers, seed=0):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3))


def token_data():
    tokens = torch.randint(1, 20, (8, 4), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": one, "labels": one[0] % 3} for one in tokens], tokens


def test_best_weights_are_loaded_by_transformers(tmp_path):
    import transformers

    data, tokens = token_data()
    model = make_bert(transformers)
    fit_here(model, tmp_path / "run", data)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/best").eval()
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
    frozen = make_bert(transformers)
    frozen.bert.requires_grad_(False)
    fit_here(frozen, tmp_path / "frozen", data)  # its file lacks the encoder, so it must not look as if it were whole
    assert not (tmp_path / "frozen/best/config.json").exists()


def test_an_adapter_is_loaded_by_peft_and_takes_little_room(tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    data, tokens = token_data()
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        model = peft.get_peft_model(make_bert(transformers), lora)
    history = fit_here(model, tmp_path / "run", data, num_epochs=3)
    assert history.train_losses[-1] < history.train_losses[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded = peft.PeftModel.from_pretrained(make_bert(transformers), tmp_path / "run/best").eval()
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits, rtol=0, atol=0)
    whole = sum(one.nbytes for one in model.parameters())
    assert (tmp_path / "run/best/model.safetensors").stat().st_size < 0.9 * whole + 2**14
    config = json.loads((tmp_path / "run/best/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
