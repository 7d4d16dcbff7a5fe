"""PEFT, TRL and accelerate train our models, and what they compute is what we compute."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import osdn
from tests.model.tiny import plain_loss
from tests.numerics import assert_close

pytestmark = pytest.mark.smoke

TEXTS = ["a small text", "another one, somewhat longer", "third", "the fourth of these texts"]


def load(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint)


def nats(model, tokenizer, texts):
    """(summed loss, targets) of texts one by one, each with the end token that TRL adds."""
    total, count = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text).input_ids])
            if ids[0, -1] != tokenizer.eos_token_id:
                ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], 1)
            total += plain_loss(model(ids).logits, ids).item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total, count


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "prompt"])
def test_adapters_of_peft(checkpoint, tmp_path, kind):
    """They train; saved and loaded, and merged where PEFT can, they compute the same."""
    peft = pytest.importorskip("peft")
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config = {
        "lora": lambda: peft.LoraConfig(r=4, **targets),
        "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **targets),
        "ia3": lambda: peft.IA3Config(**targets, feedforward_modules=["down_proj"]),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[kind]()
    torch.manual_seed(1)
    model, ids = peft.get_peft_model(load(checkpoint), config), torch.arange(40, 60)[None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    model.eval()
    expected = model(input_ids=ids).logits
    assert (expected[:, -20:] - load(checkpoint)(ids).logits).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=ids).logits, expected)
    generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated[0, 20], expected[0, -1].argmax())
    if kind != "prompt":
        assert_close(model.merge_and_unload()(ids).logits, expected, 1e-5)


def options(directory, **more):
    return dict(
        output_dir=str(directory), max_steps=1, per_device_train_batch_size=4, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no", bf16=False, seed=0,
        gradient_checkpointing=False, **more,
    )  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", [False, True])
def test_sft_of_trl_reports_the_loss_of_the_separate_texts(checkpoint, tmp_path, packing, name):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), load(checkpoint)
    total, count = nats(model, tokenizer, TEXTS)
    config = trl.SFTConfig(
        **options(tmp_path / "out"), packing=packing, padding_free=packing, max_length=128
    )
    trainer = trl.SFTTrainer(
        str(checkpoint) if name else model,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    assert trainer.train().training_loss == pytest.approx(total / count, rel=1e-4)


def test_dpo_of_trl_starts_at_log_2(checkpoint, tmp_path):
    """Where model and reference are the same, whatever the preferences are."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    pairs = {"prompt": ["what is it? "] * 4, "chosen": TEXTS, "rejected": TEXTS[::-1]}
    trainer = trl.DPOTrainer(
        str(checkpoint),
        args=trl.DPOConfig(**options(tmp_path / "out")),
        train_dataset=datasets.Dataset.from_dict(pairs),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    assert trainer.train().training_loss == pytest.approx(0.693147, rel=1e-4)


def test_grpo_of_trl_has_the_gradient_of_each_row_alone(checkpoint, tmp_path):
    """Prompts are padded on the left, completions on the right; here neither is."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer, model, seen = AutoTokenizer.from_pretrained(checkpoint), load(checkpoint), []

    def reward(prompts, completion_ids, **_):
        """Whatever tells the rows apart: the first token that each wrote."""
        rewards = [float(ids[0] % 7) for ids in completion_ids]
        seen.append((prompts, completion_ids, torch.tensor(rewards)))
        return rewards

    trainer = trl.GRPOTrainer(
        str(checkpoint),
        reward_funcs=reward,
        args=trl.GRPOConfig(
            **options(tmp_path / "out"), num_generations=2, max_completion_length=6, beta=0.0,
            loss_type="bnpo", scale_rewards="none", logging_steps=1,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["what is it? ", "a longer text: "]}),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    ((prompts, completions, rewards),) = seen
    assert len(set(prompts)) == 2 and len(completions) == 4
    pairs = rewards.view(2, 2)  # rows of one prompt follow each other
    advantages = (pairs - pairs.mean(1, keepdim=True)).flatten()
    assert advantages.any(), "choose another seed: a group of equal rewards has no gradient"
    loss = torch.zeros(())
    for prompt, completion, advantage in zip(prompts, completions, advantages):
        ids = torch.tensor([[*tokenizer(prompt).input_ids, *completion]])
        log_p = model(ids).logits[0, -len(completion) - 1 : -1].log_softmax(-1)
        loss = loss - advantage * log_p.gather(-1, torch.tensor(completion)[:, None]).sum()
    (loss / sum(map(len, completions))).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    (logged,) = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert norm > 1e-3 and logged == pytest.approx(norm.item(), rel=1e-3)


SCRIPT = """
import sys
import torch
from accelerate import Accelerator
import osdn
from transformers import AutoModelForCausalLM

accelerator = Accelerator(cpu=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
rows = torch.arange(40, 72).view(4, 8)
loader = torch.utils.data.DataLoader(rows, batch_size=4 // accelerator.num_processes)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for batch in loader:
    accelerator.backward(model(batch, labels=batch).loss)
    optimizer.step()
accelerator.wait_for_everyone()
if accelerator.is_main_process:
    torch.save(accelerator.unwrap_model(model).state_dict(), sys.argv[2])
"""


def test_accelerate_on_two_processes_takes_the_step_of_one(checkpoint, tmp_path):
    pytest.importorskip("accelerate")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(osdn.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    found = []
    for n in ("1", "2"):
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines=1",
                  f"--num_processes={n}", "--mixed_precision=no", "--dynamo_backend=no",
                  "--main_process_port=0"]  # fmt: skip
        command = [*launch, str(script), str(checkpoint), str(tmp_path / n)]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)
        found.append(torch.load(tmp_path / n))
    before = load(checkpoint).state_dict()
    for name, value in found[0].items():
        assert_close(found[1][name], value, 1e-5, name)
    assert any(not torch.equal(value, before[name]) for name, value in found[0].items())
