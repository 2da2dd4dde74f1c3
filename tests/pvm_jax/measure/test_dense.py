"""What is measured in pieces, against whole matrices: every layer of a model like the goldens'
written out once more, in NumPy."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from pvm_jax import Batch, ModelConfig, without_pvm
from pvm_jax.data.batch import hide_images, split_rows
from pvm_jax.measure.ablations import silence
from pvm_jax.measure.accuracy import answered, prompt_of, teacher_forced
from pvm_jax.measure.decision import FinalAnswer, decision, final_after, for_good
from pvm_jax.measure.dependency import FROM_BRANCH, FROM_DECODER, NO_IMAGE, dependency
from pvm_jax.measure.dependency import program as dependency_program
from pvm_jax.measure.dilution import dilution
from pvm_jax.measure.dilution import program as dilution_program
from pvm_jax.measure.evidence import evidence
from pvm_jax.measure.lens import lens
from pvm_jax.measure.looked import looked
from pvm_jax.measure.looked import program as looked_program
from pvm_jax.measure.midway import midway
from pvm_jax.measure.pictures import exchanged
from pvm_jax.measure.reading import find_answers
from pvm_jax.model.decoder import DecoderLayer
from pvm_jax.model.rope import mrope
from tests import tiny
from tests.close import assert_close
from tests.conftest import GOLDEN

BAR = 1e-5
CHUNK = 16  # no multiple of the rows' lengths: several pieces, the last one filled up


class Dense(NamedTuple):
    """Attention [L, B, N, S, S], the branch's [P, B, N, S, V], norms [P, B, S], log-probabilities
    [L, B, S, vocab]."""

    attention: np.ndarray
    branch: np.ndarray
    ffn: np.ndarray
    update: np.ndarray
    logprobs: np.ndarray


@pytest.fixture(scope="module")
def model():
    """Of the goldens that with images of two sizes and a video, four queries a key, cut to a layer
    of every kind; two have a branch."""
    config = ModelConfig.from_hf(GOLDEN / "shape_4b", remat="none")
    return tiny.randomized(tiny.cut(config, layers=3, text={"pvm_layers": (0, 2)}), 0.1)


@pytest.fixture(scope="module")
def examples(model):
    """The goldens' rows with images, several of them and a video; as answers, their text from the
    sixth token on."""
    inputs = load_file(GOLDEN / "shape_4b" / "forward_inputs.safetensors")
    rows, _ = split_rows(inputs, model.config)
    visual = (model.config.image_token_id, model.config.video_token_id)
    return [
        replace(
            row, loss_mask=~np.isin(row.input_ids, visual) & (np.arange(len(row.input_ids)) > 5)
        )
        for row in rows
        if row.num_patches
    ]


def whole_rows(model, examples) -> Batch:
    length = max(len(example.input_ids) for example in examples)
    patches = max(example.num_patches for example in examples)
    rows = [[example] for example in examples]
    return Batch.from_rows(rows, model.config, length=length, patches=patches)


@pytest.fixture(scope="module")
def reference(model, examples) -> Dense:
    batch = whole_rows(model, examples)
    graphdef, params = nnx.split(model)
    inner = jax.jit(lambda params: _inner(nnx.merge(graphdef, params), batch))(params)
    return _dense(model, batch, jax.device_get(inner))


def _inner(model, batch: Batch):
    """Every layer's queries, keys, stream before the FFN, FFN, and what the branches have: from the
    traced streams alone."""
    c, decoder, trace = model.config.text, model.language_model, model.trace(batch)
    embeds = decoder.embed_tokens(batch.tokens, jnp.float32)
    visual = jnp.take_along_axis(trace.embeds, jnp.maximum(batch.visual_index, 0)[..., None], 1)
    entering = jnp.concatenate(
        [jnp.where((batch.visual_index >= 0)[..., None], visual, embeds)[None], trace.streams[:-1]]
    )
    rotary = mrope(batch.positions, c)
    graphdef, stacked = nnx.split(decoder.layers)
    layers = []
    for layer, stream in enumerate(entering):
        block: DecoderLayer = nnx.merge(
            graphdef, jax.tree.map(lambda p, layer=layer: p[layer], nnx.as_pure(stacked))
        )
        q, k, v = block.self_attn.queries_keys_values(block.input_layernorm(stream), rotary)
        group = q.shape[2] // k.shape[2]
        weights = _softmax(q, jnp.repeat(k, group, 2), _causal(batch))
        attended = jnp.einsum("bnst,btnh->bsnh", weights, jnp.repeat(v, group, 2))
        middle = stream + block.self_attn.o_proj(attended.reshape(*attended.shape[:2], -1))
        ffn = block.mlp(block.post_attention_layernorm(middle))
        branch = None
        if str(layer) in model.pvm:
            pvm = model.pvm[str(layer)]
            read = pvm.cross_attn
            heads = lambda x, read=read: x.reshape(*x.shape[:2], -1, read.heads.dim)  # noqa: E731
            keys = read.k_norm(heads(read.k_proj(pvm.vision_reducer(trace.embeds))))
            asked = read.q_norm(heads(read.q_proj(pvm.input_norm(pvm.text_reducer(middle)))))
            own = (batch.segment_ids[:, :, None] == batch.visual_segment_ids[:, None]) & (
                batch.segment_ids > 0
            )[:, :, None]
            branch = _softmax(asked, jnp.repeat(keys, asked.shape[2] // keys.shape[2], 2), own)
        layers.append((weights, ffn, branch))
    logits = jnp.stack([model.logits(decoder.norm(stream)) for stream in trace.streams])
    return layers, trace.updates, jax.nn.log_softmax(logits)


def _causal(batch: Batch) -> np.ndarray:
    same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None]
    return same & np.tri(batch.tokens.shape[1], dtype=bool)


def _softmax(q, k, mask):
    scores = jnp.einsum("bsnh,btnh->bnst", q, k) / np.sqrt(q.shape[-1])
    weights = jnp.where(mask[:, None], jnp.exp(scores - scores.max(-1, keepdims=True)), 0)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)


def _dense(model, batch: Batch, inner) -> Dense:
    layers, updates, logprobs = inner
    with_branch = sorted(model.config.text.pvm_layers)
    return Dense(
        np.stack([weights for weights, _, _ in layers]),
        np.stack([layers[layer][2] for layer in with_branch]),
        np.stack([np.linalg.norm(layers[layer][1], axis=-1) for layer in with_branch]),
        np.stack([np.linalg.norm(updates[layer], axis=-1) for layer in with_branch]),
        logprobs,
    )


def test_attention_the_branch_and_the_lens_are_those_of_whole_matrices(model, examples, reference):
    answers = find_answers(examples)
    visual = [
        np.isin(e.input_ids, (model.config.image_token_id, model.config.video_token_id))
        for e in examples
    ]
    diluted = dilution(model, examples, rows=2, chunk=CHUNK)
    seen = looked(model, examples, answers.columns, rows=2, chunk=CHUNK)
    inner = lens(model, examples, rows=2, chunk=CHUNK)
    forced = teacher_forced(model, examples, rows=2, chunk=CHUNK)
    for row, example in enumerate(examples):
        before = answers.columns[row][answers.real[row]] - 1
        count, ends = len(before), len(example.input_ids)
        on_visual = reference.attention[:, row, :, before][..., :ends][..., visual[row]].mean(
            2
        )  # [A, L, visual]
        assert_close(diluted.mass[row, :, :count].T, on_visual.sum(-1), BAR)
        assert_close(
            diluted.uniform[row, :count], np.cumsum(visual[row])[before] / (before + 1), BAR
        )
        for got, want in ((diluted.ffn, reference.ffn), (diluted.update, reference.update)):
            assert_close(got[row, :, :count], want[:, row, before], BAR)
        tokens = visual[row].sum()
        assert_close(seen.decoder[row, :, :count, :tokens], np.moveaxis(on_visual, 0, 1), BAR)
        branch = reference.branch[:, row][:, :, before]
        assert_close(seen.branch[row, :, :, :count, :tokens], branch[..., :tokens], BAR)
        totals = seen.branch[row, :, :, :count].sum(-1)
        assert_close(totals, np.ones_like(totals), BAR)
        assert not seen.branch[row, ..., tokens:].any()

        own, final = reference.logprobs[:, row, before], reference.logprobs[-1, row, before]
        token = final.argmax(-1)
        chosen = np.take_along_axis(own, np.broadcast_to(token, own.shape[:-1])[..., None], -1)
        assert_close(inner.probability[row, :, :count], np.exp(chosen[..., 0]), 5 * BAR)
        np.testing.assert_array_equal(inner.rank[row, :, :count], (own > chosen).sum(-1))
        assert_close(inner.kl[row, :, :count], (np.exp(final) * (final - own)).sum(-1), 3 * BAR)
        true = example.input_ids[before + 1]
        assert_close(forced.loss[row, :count], -final[np.arange(count), true], BAR)
        np.testing.assert_array_equal(forced.correct[row, :count], token == true)
        for values in (diluted.mass, inner.kl, forced.loss[:, None]):
            assert np.isnan(values[row, :, count:]).all()
    assert (
        np.ptp(diluted.mass[np.isfinite(diluted.mass)]) > 0.01
    )  # not all alike: the comparison says something


def test_a_token_settles_where_its_rank_is_first_0_for_good(model, examples):
    found = lens(model, examples, rows=2, chunk=CHUNK)
    for rank, settled in zip(
        np.moveaxis(found.rank, 1, 2).reshape(-1, 3), found.settled.reshape(-1), strict=True
    ):
        if np.isfinite(settled):
            assert not rank[int(settled) :].any()
            assert settled == 0 or rank[int(settled) - 1] > 0


def test_dependency_is_the_divergence_of_whole_distributions(model, examples, reference):
    """Each row's, from logits of all columns: with the image, without it, and with it hidden from
    one of the two who see it."""
    answers = find_answers(examples)
    found = dependency(model, examples, rows=2, chunk=CHUNK)
    batch = whole_rows(model, examples)
    bare = hide_images(batch, [True] * len(examples))
    silent = silence(model, [*map(int, model.pvm)])
    others = {
        NO_IMAGE: silent(bare),
        FROM_BRANCH: silent(batch),
        FROM_DECODER: model(bare),
    }
    assert list(found) == list(others)
    seen = reference.logprobs[-1].astype(np.float64)
    for name, logits in others.items():
        other = np.asarray(jax.nn.log_softmax(logits), np.float64)
        whole = (np.exp(seen) * (seen - other)).sum(-1)
        wanted = np.take_along_axis(whole, answers.columns - 1, 1)
        assert_close(found[name], answers.where_real(wanted), 2 * BAR)
        assert np.nanmean(found[name]) > 100 * BAR  # something hangs on it


def test_a_model_without_a_branch_is_measured_too(model, examples):
    batch, plain = whole_rows(model, examples), without_pvm(model)
    columns = find_answers(examples).columns[:, :2]
    rows = len(examples)

    def shapes(program):
        found = jax.eval_shape(lambda: program(plain, batch, columns, CHUNK))
        return jax.tree.map(lambda x: x.shape, found)

    assert shapes(dependency_program) == {NO_IMAGE: (rows, 2)}  # no branch to hide it from
    _, _, *sizes = shapes(dilution_program)
    assert sizes == [(rows, 0, 2)] * 2
    branch, decoder = shapes(looked_program)
    assert branch[:2] == (rows, 0)
    assert decoder[:2] == (rows, 3)


def test_midway_is_what_whole_rows_go_on_to_write(model, examples):
    """Token by token from the logits of all columns, behind what was kept of the model's answer."""
    pair = [examples[0], examples[-1]]
    settings = {"stop_tokens": (), "max_new_tokens": 6, "rows": 2}
    found = midway(model, pair, fractions=(0, 0.5), chunk=CHUNK, **settings)
    prompts = [prompt_of(example)[0] for example in pair]
    others = exchanged(prompts, model.config.vision)
    blind = silence(model, [*map(int, model.pvm)])
    own, new = (write_densely(model, those, [[], []]) for those in (prompts, others))
    halves = [tokens[:3] for tokens in own]
    late, gone = write_densely(model, others, halves), write_densely(blind, prompts, halves, hide=1)
    never = write_densely(blind, prompts, [[], []], hide=1)
    assert [[ids.tolist() for ids in those] for those in found.written] == [new, late]
    own, new, late, gone, never = map(np.array, (own, new, late, gone, never))
    cut = np.where(np.arange(6) < 3, np.nan, 0)
    told = np.where(own != new, 0, np.nan)
    assert np.isfinite(told[:, 3:]).any()
    for got, at_once, midway_ in (
        (found.follows, (new == new) + told, (late == new) + told + cut),
        (found.stays, (new == own) + told, (late == own) + told + cut),
        (found.removed, never == own, (gone == own) + cut),
    ):
        np.testing.assert_array_equal(got, [at_once, midway_])
    losses = [read_densely(model, those, late.tolist()) for those in (prompts, others)]
    size = np.nanmax(losses)
    assert_close(found.evidence[1], losses[0] - losses[1] + cut, BAR, scale=size)
    with pytest.raises(ValueError, match=r"fractions begin with 0 and are below 1, got \[0, 1\]"):
        midway(model, pair, fractions=(0, 1), **settings)


def write_densely(model, prompts, begun, hide=0) -> list[list[int]]:
    """Six tokens behind each prompt, of which `begun` are there; no placeholder is ever written."""
    texts = [[*tokens] for tokens in begun]
    while len(texts[0]) < 6:
        for text, logits in zip(texts, next_logits(model, prompts, texts, hide), strict=True):
            logits[[model.config.image_token_id, model.config.video_token_id]] = -np.inf
            text.append(int(logits.argmax()))
    return texts


def next_logits(model, prompts, texts, hide=0) -> list[np.ndarray]:
    """[vocab] behind each prompt and its text; one shape for all lengths."""
    rows = [
        replace(prompt, input_ids=np.concatenate([prompt.input_ids, text]).astype(np.int32))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    length = max(len(prompt.input_ids) for prompt in prompts) + 6
    patches = max(prompt.num_patches for prompt in prompts)
    batch = Batch.from_rows([[row] for row in rows], model.config, length=length, patches=patches)
    logits = np.array(model(hide_images(batch, [bool(hide)] * len(rows))))
    return [of_row[len(row.input_ids) - 1] for of_row, row in zip(logits, rows, strict=True)]


def read_densely(model, prompts, texts) -> np.ndarray:
    """[conversations, 6], the loss of each token of the texts."""
    columns = []
    for place in range(6):
        logits = np.stack(next_logits(model, prompts, [text[:place] for text in texts]))
        logprobs = np.asarray(jax.nn.log_softmax(logits))
        columns.append([-row[text[place]] for row, text in zip(logprobs, texts, strict=True)])
    return np.array(columns).T


def test_a_final_answer_is_decided_where_whole_rows_write_it_for_good(model, examples):
    """The last token but one leads to the final answer, the last one: what the model itself writes
    there, so that it is the same with all of the text."""
    prompts = [prompt_of(example)[0] for example in (examples[0], examples[-1])]
    texts = [np.array(text) for text in write_densely(model, prompts, [[], []])]
    own = answered(prompts_with_answers(prompts), texts)
    shares = (0, 0.5, 0.75, 1)
    found = decision(model, own, [FinalAnswer(4, 5)] * 2, shares=shares, rows=2, chunk=CHUNK)
    for place, kept in enumerate((0, 2, 3, 4)):
        short = [[*text[:kept], text[4]] for text in texts]
        logits = np.stack(next_logits(model, prompts, short))
        last = [text[5] for text in texts]
        logprobs = np.asarray(jax.nn.log_softmax(logits))[[0, 1], last]
        assert_close(found.logprob[place], logprobs, BAR)
        np.testing.assert_array_equal(found.same[place], logits.argmax(-1) == last)
    assert found.same[-1].all()
    np.testing.assert_array_equal(found.decided, for_good(found.same, shares))
    with pytest.raises(ValueError, match="is not inside an answer of 6 tokens"):
        decision(model, own, [FinalAnswer(4, 6)] * 2, rows=2)


def test_what_changes_once_more_is_not_decided():
    same = np.array([[1, 1, 0, 1], [0, 1, 0, 1], [1, 1, 0, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(for_good(same, (0, 0.3, 0.6, 1)), [0.6, 0, 1, np.nan])


def prompts_with_answers(prompts):
    """Each with one more token to learn, which `answered` replaces."""
    grown = [replace(one, input_ids=np.append(one.input_ids, 1)) for one in prompts]
    return [
        replace(e, loss_mask=np.arange(len(e.input_ids)) == len(e.input_ids) - 1) for e in grown
    ]


def test_the_final_answer_follows_the_last_marker():
    words = ["So <", "answer", "> ", "4 no <", "answer", ">", "5", "!"]

    def find(marker, words=words):
        return final_after(np.arange(len(words)), marker, lambda ids: words[ids[0]])

    assert find("<answer>") == FinalAnswer(3, 6)
    assert find("So") == FinalAnswer(0, 1)
    assert find("think") is None
    assert find("5!") is None  # nothing behind it


def test_evidence_is_attention_of_whole_matrices_without_sinks(model, examples, reference):
    """With boxes on half of the first row's image, and none in the others."""
    examples = [replace(e, loss_mask=_last(3, e.loss_mask)) for e in examples]
    answers, times = find_answers(examples), 1.0
    ids = (model.config.image_token_id, model.config.video_token_id)
    visual = [np.isin(example.input_ids, ids) for example in examples]
    marked = np.flatnonzero(visual[0])[::2]
    seen = np.zeros(2, int)  # sinks of all conversations: in the image, and elsewhere
    boxed = [replace(examples[0], evidence=marked), *examples[1:]]
    found = evidence(model, boxed, times=times, rows=2, chunk=CHUNK)
    chance = [len(marked) / visual[0].sum(), *[np.nan] * (len(boxed) - 1)]
    assert_close(found.chance, np.array(chance), BAR)
    for row in range(len(boxed)):
        columns = answers.columns[row][answers.real[row]]
        looked_at = reference.attention[:, row].mean(1)[:, columns - 1, : len(visual[row])]
        sinks = (looked_at * columns[:, None]).min(1) >= times  # [L, S]
        sinks[:, columns[0] :] = False
        np.testing.assert_array_equal(found.sinks[row], sinks.sum(-1))
        seen += sinks[:, visual[row]].sum(), sinks[:, ~visual[row]].sum()
        kept = np.where(sinks[:, None], 0, looked_at)
        image = kept[..., visual[row]].sum(-1)
        count = len(columns)
        assert_close(found.mass[row, :, :count], image / kept.sum(-1), BAR)
        assert np.isnan(found.mass[row, :, count:]).all()
        if row == 0:
            share = kept[..., marked].sum(-1) / np.where(image, image, np.nan)
            assert_close(found.marked[0, :, :count], share, BAR)
        else:
            assert np.isnan(found.marked[row]).all()
    assert seen.all()


def _last(count: int, mask: np.ndarray) -> np.ndarray:
    """`mask` with its last `count` True alone."""
    return mask & (np.cumsum(mask[::-1])[::-1] <= count)
