"""A BERT of two layers learns from one of three: VID on hidden states, KD on the words, padding left out of both.

    python examples/bert_to_bert.py                                # a minute or two on a laptop's CPU
    python examples/bert_to_bert.py --steps 2 --teacher-steps 2    # to see that it runs

The language is synthetic, made below: 16 sentences of a vocabulary of 40 words, said with an error in one word of ten.
So a word that is masked can be told from the others of its sentence, which is what the networks learn. They start from
random weights. Nothing is downloaded.

Needs `pip install 'vidfast[train]' transformers`.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import BertConfig, BertForMaskedLM

from vidfast.distill import KD, VID, Distiller

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PADDING, MASK, FIRST_WORD, WORDS = 0, 1, 2, 40
LENGTH, BATCH_SIZE = 16, 64
IGNORED = -100  # the label of tokens that are not asked for

SENTENCES = torch.randint(WORDS, (16, LENGTH), generator=torch.Generator().manual_seed(0))


def make_batch(generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Sentences of 6 to 16 words, padded, one word in five masked: the inputs by name, and the labels (B, L)."""
    words = SENTENCES[torch.randint(len(SENTENCES), (BATCH_SIZE,), generator=generator)]
    noise = torch.randint(WORDS, words.shape, generator=generator)
    tokens = FIRST_WORD + torch.where(torch.rand(words.shape, generator=generator) < 0.1, noise, words)
    lengths = torch.randint(6, LENGTH + 1, (BATCH_SIZE, 1), generator=generator)
    present = torch.arange(LENGTH) < lengths
    asked = present & (torch.rand(tokens.shape, generator=generator) < 0.2)
    labels = tokens.masked_fill(~asked, IGNORED)
    tokens = tokens.masked_fill(asked, MASK).masked_fill(~present, PADDING)
    inputs = {"input_ids": tokens.to(DEVICE), "attention_mask": present.long().to(DEVICE)}
    return inputs, labels.to(DEVICE)


def make_bert(layers: int, width: int) -> BertForMaskedLM:
    """A small BERT with random weights; your own is `BertForMaskedLM.from_pretrained(name)`."""
    config = BertConfig(
        vocab_size=FIRST_WORD + WORDS,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PADDING,
    )
    return BertForMaskedLM(config).to(DEVICE)


def word_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits (B, L, words): torch's has the classes in dimension 1."""
    return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED)


def train(title: str, distiller: Distiller, steps: int) -> None:
    """Trains the distiller's student, and prints how it does before and after.

    Args:
        title: What is printed before the numbers.
        distiller: The student with its terms; without terms it learns from the labels alone.
        steps: The number of batches.
    """
    before = accuracy(distiller.student)
    # Not student.parameters(): the terms' regressors and variances are trained too.
    optimizer = torch.optim.AdamW(distiller.parameter_groups(lr=3e-3, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    generator = torch.Generator().manual_seed(1)
    distiller.train()
    for _ in tqdm(range(steps), title, leave=False):
        inputs, labels = make_batch(generator)
        # Padded tokens do not count in the terms. The labels' loss takes no mask: there they are ignored labels.
        losses = distiller(inputs, labels, mask=inputs["attention_mask"] if distiller.terms else None)
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
        schedule.step()
    terms = ", ".join(f"{name} {value:.3f}" for name, value in losses.terms.items())
    after = accuracy(distiller.student)
    print(f"{title}: test accuracy {before:.1f} % before, {after:.1f} % after, last losses: {terms}")


@torch.no_grad()
def accuracy(bert: BertForMaskedLM) -> float:
    """The percentage of masked words that the network tells rightly, in ten batches that it never learns from."""
    bert.eval()
    generator, right = torch.Generator().manual_seed(2), []
    for _ in range(10):
        inputs, labels = make_batch(generator)
        asked = labels != IGNORED
        right.append(bert(**inputs).logits.argmax(-1)[asked] == labels[asked])
    return 100 * torch.cat(right).float().mean().item()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Distillation from one BERT to another")
    parser.add_argument(
        "--steps", type=int, default=250, help="batches of each student (default: %(default)s)"
    )
    parser.add_argument(
        "--teacher-steps", type=int, default=400, help="of the teacher (default: %(default)s)"
    )
    options = parser.parse_args()

    torch.manual_seed(0)
    teacher = make_bert(layers=3, width=64)
    train("teacher", Distiller(teacher, task_loss=word_loss), options.teacher_steps)
    train("student alone", Distiller(make_bert(2, 32), task_loss=word_loss), options.steps)

    pairs = {"bert.encoder.layer.0": "bert.encoder.layer.0", "bert.encoder.layer.1": "bert.encoder.layer.2"}
    terms = [
        # In a training as short as this one, a simple regressor and a small first variance help.
        VID(pairs, regressor="linear", init_var=1.0, weight=10.0),
        # The logits are (B, L, words). Of the tokens that have no label KD takes none.
        KD(class_dim=-1, ignore_index=IGNORED),
    ]
    example, _ = make_batch(torch.Generator().manual_seed(0))
    distiller = Distiller(make_bert(2, 32), teacher, terms, example=example, task_loss=word_loss)
    train("student with VID and KD", distiller, options.steps)


if __name__ == "__main__":
    main()
