"""The first half of the tour: from the waveform to the embeddings that the LM reads.

Shapes: M mel bins, F mel frames, T encoder frames, A audio embeddings, Q queries, K taps.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from adapters import SQUEEZE, BertAttention
from encoder import FRAMES_PER_SECOND, SAMPLE_RATE, log_mel
from evaluation.figure import figure
from lab.tour_scene import Clip, Scene, encode, mark_words, nearest_words, with_other
from toy.grammar import ATTRIBUTES

COMPARED = 24  # clips in the picture of what moves


def show_mel(axis: Axes, clip: Clip) -> None:
    """The log-mel of a clip, with its words above; x in seconds."""
    seconds = len(clip.waveform) / SAMPLE_RATE
    mel = log_mel(clip.waveform)  # (M, F)
    extent = (0, seconds, 0, len(mel))
    axis.imshow(mel, origin="lower", aspect="auto", cmap="magma", extent=extent)
    axis.set(ylabel="mel bin", xlim=(0, seconds))
    mark_words(axis, clip, 1, 1.03 * len(mel))


def draw_sound(scene: Scene, path: Path) -> None:
    """The waveform, and below it the log-mel."""
    clip = scene.clip
    seconds = torch.arange(len(clip.waveform)) / SAMPLE_RATE
    with figure(path, rows=2, size=(9, 3.8), height_ratios=(1, 1.6), sharex=True) as (wave, mel):
        wave.plot(seconds, clip.waveform, lw=0.4, color="#0969da")
        wave.set(yticks=[], ylabel="waveform")
        show_mel(mel, clip)
        mel.set_xlabel("seconds")


def draw_states(scene: Scene, path: Path) -> None:
    """How similar each frame's state is to every other's, in each hidden state of the encoder."""
    states, frames = encode(scene.model, scene.clip)
    T = int(frames)
    with figure(path, columns=len(states), size=(10, 3.1)) as axes:
        for number, (axis, state) in enumerate(zip(axes, states)):
            # The mean is taken out: all states have a large part in common.
            own = state[0, :T] - state[0, :T].mean(dim=0)  # (T, D_w)
            own = F.normalize(own, dim=-1)
            axis.imshow(own @ own.T, cmap="magma", vmin=-0.3, vmax=1)

            middles = [(a + b) / 2 * FRAMES_PER_SECOND for _, a, b in scene.clip.words]
            words = [word for word, _, _ in scene.clip.words]
            axis.set_xticks(middles, words, rotation=90, fontsize=7)
            axis.set_yticks(middles, words if number == 0 else [""] * len(words), fontsize=7)
            axis.tick_params(length=0)
            into = "what enters block 1" if number == 0 else f"after block {number}"
            axis.set_title(f"state {number}: {into}", fontsize=9)


def draw_words(scene: Scene, path: Path) -> None:
    """The LM's token nearest to each semantic embedding, along the log-mel."""
    words, cosines = nearest_words(scene.model, scene.clip)
    with figure(path, rows=2, size=(10, 3.6), height_ratios=(1, 1.1), sharex=True) as (mel, text):
        show_mel(mel, scene.clip)

        # An embedding covers four encoder frames, 80 ms. A darker bar repeats its left neighbour.
        width = SQUEEZE / FRAMES_PER_SECOND
        for i, (word, cosine) in enumerate(zip(words, cosines)):
            middle = (i + 0.5) * width
            fill = "#4ac26b" if i > 0 and words[i - 1] == word else "#aceebb"
            text.bar(middle, cosine, 0.9 * width, color=fill)
            text.text(middle, 0.02, word, rotation=90, ha="center", va="bottom", fontsize=8)
        text.set(ylim=(0, 0.7), ylabel="cosine to the\nnearest token", xlabel="seconds")


def cross_attention(scene: Scene, clip: Clip) -> Tensor:
    """Weights (K, Q, T) of the Q-Former's last cross-attention, the mean over its heads."""
    acoustic = scene.model.acoustic
    found = []

    def record(attention: BertAttention, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        # The module keeps no weights, so they are computed again from its inputs.
        x, source = inputs
        heads = attention.n_heads
        q = attention.query(x).unflatten(-1, (heads, -1)).transpose(1, 2)  # (1, H, Q, C)
        k = attention.key(source).unflatten(-1, (heads, -1)).transpose(1, 2)  # (1, H, T, C)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        found.append(scores.softmax(dim=-1).mean(dim=1)[0])  # (Q, T)

    handle = acoustic.blocks[-1].cross_attn.register_forward_hook(record)
    states, _ = encode(scene.model, clip)
    acoustic(states)
    handle.remove()
    return torch.stack(found)


def draw_attention(scene: Scene, path: Path) -> None:
    """Where each acoustic query looks: over time, in each tapped state."""
    clip = scene.clip
    weights = cross_attention(scene, clip)  # (K, Q, T)
    shares = scene.model.acoustic.layer_weights.softmax(dim=-1)  # (Q, K)
    with figure(path, rows=len(weights), size=(9, 5), sharex=True) as axes:
        for axis, tap, part, share in zip(axes, scene.model.config.taps, weights, shares.T):
            axis.imshow(part.clamp(max=part.quantile(0.99)), aspect="auto", cmap="magma")
            axis.set_ylabel(f"state {tap}\nqueries", fontsize=9)
            axis.set_yticks(range(len(part)), range(1, len(part) + 1), fontsize=7)
            axis.axvline(len(clip.waveform) / SAMPLE_RATE * FRAMES_PER_SECOND, color="cyan", lw=1)
            note = f"weight of this state: {share.mean():.2f}"
            axis.text(part.shape[1] - 1, 0.2, note, color="w", ha="right", va="top", fontsize=8)
        mark_words(axes[0], clip, FRAMES_PER_SECOND, -0.7)
        axes[-1].set_xlabel("encoder frame (20 ms); the clip ends at the line")


def embeddings_of(scene: Scene, clip: Clip) -> Tensor:
    """The Q acoustic embeddings, then the words at 16 points in time: (Q + 16, D)."""
    states, frames = encode(scene.model, clip)
    audio, mask = scene.model.hear(states, frames)
    n_queries = scene.model.config.n_queries
    words = F.interpolate(audio[:, n_queries:].transpose(1, 2), 16, mode="linear")  # (1, D, 16)
    return torch.cat([audio[0, :n_queries], words[0].T])


def draw_changes(scene: Scene, path: Path) -> None:
    """How far each acoustic query, and the words, move when one thing about a clip changes."""
    n_queries = scene.model.config.n_queries
    base = [embeddings_of(scene, clip) for clip in scene.clips[:COMPARED]]
    pairs = zip(base, base[1:] + base[:1])
    usual = torch.stack([(a - b).norm(dim=-1) for a, b in pairs]).mean(dim=0)  # (Q + 16,)

    # One attribute after the other takes another of its values; then the words change alone.
    rows = {}
    for name in (*ATTRIBUTES, "words"):
        moved = []
        for clip, own in zip(scene.clips, base):
            changed = embeddings_of(scene, with_other(clip, name, scene.data))
            moved.append((changed - own).norm(dim=-1))
        ratio = torch.stack(moved).mean(dim=0) / usual  # (Q + 16,)
        rows[name] = torch.cat([ratio[:n_queries], ratio[n_queries:].mean()[None]])

    with figure(path, size=(8, 3.3)) as axis:
        table = torch.stack(list(rows.values()))
        picture = axis.imshow(table, aspect="auto", cmap="magma", vmin=0, vmax=1)
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                ink = "black" if value > 0.6 else "white"
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
        columns = [f"query {i + 1}" for i in range(n_queries)] + ["words"]
        axis.set_xticks(range(len(columns)), columns, rotation=30, fontsize=8)
        axis.set_yticks(range(len(rows)), [f"other {name}" for name in rows])
        axis.axvline(n_queries - 0.5, color="white", lw=3)
        axis.figure.colorbar(picture, label="moved; 1: as far as\nto another clip")
