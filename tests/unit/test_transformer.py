"""The Transformer against transformers' Llama, and the promises of its config, tables and initial weights."""

from __future__ import annotations

import math
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ftlab.config.build import build
from ftlab.config.check import first_phase
from ftlab.config.compose import CONF, compose
from ftlab.errors import ConfigError
from ftlab.models.attention import Causal
from ftlab.models.config import ModelConfig
from ftlab.models.hf_layout import hf_names
from ftlab.models.layers import Attention, KVCache, LayerCache, RMSNorm
from ftlab.models.rotary import RotaryEmbedding, Rotation
from ftlab.models.transformer import Transformer

OPTIONS = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem not in ("auto", "hf"))
# The sizes that the Hub shows for each repository's safetensors, tied heads counted once.
PUBLISHED = {
    "llama2_7b": 6_738_415_616, "llama2_13b": 13_015_864_320, "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248, "llama3_1_8b": 8_030_261_248, "llama3_1_70b": 70_553_706_496,
    "llama3_2_1b": 1_235_814_400, "llama3_2_3b": 3_212_749_824, "llama3_3_70b": 70_553_706_496,
    "mistral_7b_v0_1": 7_241_732_096, "mistral_7b": 7_248_023_552,
    "qwen2_5_0_5b": 494_032_768, "qwen2_5_1_5b": 1_543_714_304, "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512, "qwen2_5_14b": 14_770_033_664, "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920, "qwen3_1_7b": 1_720_574_976, "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360, "qwen3_14b": 14_768_307_200, "qwen3_32b": 32_762_123_264,
    "smollm2_135m": 134_515_008, "smollm2_360m": 361_821_120, "smollm2_1_7b": 1_711_376_384,
}  # fmt: skip


def small(**changes) -> ModelConfig:
    sizes = {
        "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": None, "ffn_hidden_dim": 48,
        "vocab_size": 61, "norm_eps": 1e-5, "rope_theta": 10000.0, "max_seq_len": 64,
        "sliding_window": None, "family": "llama", "rope_scaling": None,
        "tie_embeddings": False, "checkpoint": None,
    }  # fmt: skip
    return ModelConfig(**(sizes | changes))


def initialised(config: ModelConfig, seed: int = 0) -> Transformer:
    model = config.build()
    model.init_weights(seed)
    return model


def option(name: str) -> ModelConfig:
    """The model of ``conf/model/<name>.yaml``, composed as a run composes it."""
    config, _ = first_phase(compose([f"model={name}"]))
    return build(config["model"])


def llama_with_the_same_weights(model: Transformer) -> LlamaForCausalLM:
    config = model.config
    twin = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.dim, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim,
            intermediate_size=config.ffn_hidden_dim, vocab_size=config.vocab_size,
            rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta,
            max_position_embeddings=config.max_seq_len, tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    )  # fmt: skip
    theirs = dict(twin.named_parameters())
    names = hf_names(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            theirs[names[name]].copy_(parameter)
    return twin


@st.composite
def configs(draw) -> ModelConfig:
    n_kv_heads = draw(st.integers(1, 3))
    n_heads = n_kv_heads * draw(st.integers(1, 3))
    return small(
        dim=n_heads * draw(st.integers(2, 9)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=draw(st.sampled_from([2, 6, 10, 16])),
        ffn_hidden_dim=draw(st.integers(1, 50)),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        rope_theta=draw(st.sampled_from([100.0, 10000.0, 500000.0])),
        tie_embeddings=draw(st.booleans()),
    )


@settings(max_examples=12, deadline=None, derandomize=True)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_logits_and_gradients_equal_those_of_transformers(config, seed):
    model = initialised(config, seed)
    twin = llama_with_the_same_weights(model)
    tokens = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(seed))

    ours, theirs = model(tokens), twin(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    F.cross_entropy(ours.flatten(0, 1), tokens.flatten()).backward()
    F.cross_entropy(theirs.flatten(0, 1), tokens.flatten()).backward()
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = expected[hf_names(config)[name]].grad
        error = (parameter.grad - gradient).norm() / gradient.norm().clamp_min(1e-8)
        assert error < 1e-4, f"{name}: {error:.2e}"


def test_rmsnorm_in_float32_is_bitwise_that_of_transformers():
    x, weight = torch.randn(64, 32) * 3, torch.randn(32)
    theirs = LlamaRMSNorm(32, 1e-5)
    theirs.weight.data.copy_(weight)
    assert torch.equal(F.rms_norm(x, (32,), weight, 1e-5), theirs(x))


def test_rmsnorm_in_bfloat16_is_at_least_as_exact_as_that_of_transformers():
    x, weight = (torch.randn(512, 32) * 3).bfloat16(), torch.randn(32).bfloat16()
    theirs = LlamaRMSNorm(32, 1e-5).bfloat16()
    theirs.weight.data.copy_(weight)
    exact = F.rms_norm(x.double(), (32,), weight.double(), 1e-5)
    our_error = (F.rms_norm(x, (32,), weight, 1e-5) - exact).abs()
    assert our_error.mean() <= (theirs(x) - exact).abs().mean()
    assert (our_error <= exact.abs() * 2**-8).all()  # half a unit in the last place of 8 bits


@pytest.mark.parametrize("name", OPTIONS)
def test_the_parameter_count_is_exact_and_the_published_one(name):
    config = option(name)
    if config.vocab_size is None:
        config = config.replace(vocab_size=1000)
    with torch.device("meta"):
        model = config.replace(max_seq_len=8).build()
    assert config.n_params() == sum(parameter.numel() for parameter in model.parameters())
    if name != "llama_tiny":  # ours, and published nowhere
        assert config.n_params() == PUBLISHED[name]
        header = (CONF / f"model/{name}.yaml").read_text().splitlines()[0]
        assert f"{PUBLISHED[name]:,} parameters" in header


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_the_count_follows_tied_embeddings_and_free_head_widths(tie_embeddings):
    config = small(head_dim=10, tie_embeddings=tie_embeddings)
    assert config.n_params() == sum(parameter.numel() for parameter in config.build().parameters())


def test_the_70b_is_built_on_meta_in_seconds():
    start = time.perf_counter()
    with torch.device("meta"):
        option("llama2_70b").build()
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"n_heads": 5}, "model.n_heads"),
        ({"dim": 36, "n_heads": 12, "n_kv_heads": None}, "model.n_heads"),
        ({"n_heads": 5, "head_dim": 8}, "model.n_heads"),
        ({"n_kv_heads": 3}, "model.n_kv_heads"),
        ({"head_dim": 7}, "model.head_dim"),
        ({"n_layers": 0}, "model.n_layers"),
        ({"dim": "wide"}, "model.dim"),
        ({"vocab_size": -1}, "model.vocab_size"),
        ({"norm_eps": 0.0}, "model.norm_eps"),
    ],
)
def test_an_impossible_shape_names_its_key(changes, key):
    with pytest.raises(ConfigError) as caught:
        small(**changes)
    assert caught.value.key == key


@pytest.mark.parametrize("changes", [{"n_heads": 5}, {"n_kv_heads": 3}, {"head_dim": 7}])
def test_the_offered_fix_of_a_shape_works(changes):
    with pytest.raises(ConfigError) as caught:
        small(**changes)
    key, value = caught.value.fix.removeprefix("model.").split("=")
    small(**{key: int(value)})


def test_a_model_without_vocabulary_size_is_refused_when_built():
    with pytest.raises(ConfigError, match=r"model\.vocab_size: null"):
        small(vocab_size=None).build()


def test_null_heads_and_head_width_follow_the_other_sizes():
    config = small(n_kv_heads=None)
    assert (config.n_kv_heads, config.head_dim) == (4, 8)


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize(("dim", "vocab_size"), [(128, 1000), (768, 4000)])
def test_the_first_loss_of_random_weights_is_that_of_a_uniform_guess(dim, vocab_size, tie_embeddings):
    config = small(dim=dim, ffn_hidden_dim=2 * dim, vocab_size=vocab_size, tie_embeddings=tie_embeddings)
    tokens = torch.randint(vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = initialised(config)(tokens[:, :-1])
    assert F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item() == pytest.approx(
        math.log(vocab_size), abs=0.3
    )


def test_initial_weights_depend_on_the_seed_alone():
    with torch.device("meta"):
        late = small().build()
    late.to_empty(device="cpu").init_weights(0)
    torch.manual_seed(123)
    for (name, early), other in zip(initialised(small()).named_parameters(), late.parameters(), strict=True):
        assert torch.equal(early, other), name
    assert not torch.equal(initialised(small(), seed=1).embedding.weight, late.embedding.weight)


def test_initial_weights_in_bfloat16_are_those_of_float32_rounded():
    model = small().build().bfloat16()
    model.init_weights(0)
    for half, full in zip(model.parameters(), initialised(small()).parameters(), strict=True):
        assert torch.equal(half, full.bfloat16())


def test_rotary_tables_survive_the_way_from_meta():
    with torch.device("meta"):
        model = small().build()
    model.to_empty(device="cpu")
    model.init_weights(0)
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens), initialised(small())(tokens))


def test_rotary_tables_stay_float32_in_a_bfloat16_model():
    expected = RotaryEmbedding(8, 64, 10000.0, None)
    rotary = small().build().bfloat16().rotary
    assert torch.equal(rotary.cos, expected.cos)
    assert torch.equal(rotary.sin, expected.sin)


def test_rotary_tables_are_no_part_of_the_state_dict():
    assert small().build().state_dict().keys() == dict(small().build().named_parameters()).keys()


@pytest.fixture
def one_rank_mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_rotation_angles_stay_float32_in_a_block_that_fsdp_runs_in_bfloat16(one_rank_mesh, monkeypatch):
    dtypes = set()
    rotate = Rotation.__call__

    def recording(self, x):
        dtypes.add((self.cos.dtype, x.dtype))
        return rotate(self, x)

    monkeypatch.setattr(Rotation, "__call__", recording)
    model = initialised(small())
    bfloat16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=one_rank_mesh, mp_policy=bfloat16)
    model(torch.arange(20)[None])
    assert dtypes == {(torch.float32, torch.bfloat16)}


def test_padding_on_the_right_changes_nothing_before_it():
    model = initialised(small())
    tokens = torch.arange(1, 13)[None]
    padded = F.pad(tokens, (0, 5))
    torch.testing.assert_close(model(padded)[:, :12], model(tokens), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_the_loss_sees_hidden_states_and_the_head_that_make_the_logits(tie_embeddings):
    model = initialised(small(tie_embeddings=tie_embeddings))
    tokens, targets = torch.arange(12).view(2, 6), torch.arange(1, 13).view(2, 6)

    def loss(hidden, weight, flat_targets):
        assert hidden.shape == (12, 32)
        assert torch.equal(flat_targets, targets.flatten())
        return F.cross_entropy(hidden @ weight.T, flat_targets)

    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, targets, loss), expected)


def test_logits_through_the_cache_equal_those_without():
    model = initialised(small())
    tokens = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(0))
    cache = KVCache(n_layers=2, capacity=20)
    chunks = [model(part, cache=cache) for part in tokens.split([9, 1, 1, 6, 3], dim=1)]
    assert cache.length == 20
    torch.testing.assert_close(torch.cat(chunks, dim=1), model(tokens), rtol=0, atol=1e-5)


def test_a_sequence_longer_than_the_model_names_both_lengths():
    with pytest.raises(ConfigError, match=r"seq_len: a sequence of 65 tokens .* model\.max_seq_len=64"):
        initialised(small())(torch.zeros(1, 65, dtype=torch.int64))


def test_attention_gets_one_dtype_where_autocast_takes_norms_to_float32(monkeypatch):
    """As CUDA's does, and a CPU's does not."""
    plain = RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda norm, x: plain(norm, x.float()))
    attention = Attention(dim=16, n_heads=4, n_kv_heads=2, head_dim=8, qkv_bias=False, qk_norm_eps=1e-6).bfloat16()
    seen = []

    def attend(q, k, v):
        seen.extend(t.dtype for t in (q, k, v))
        return q

    attention(torch.ones(1, 3, 16, dtype=torch.bfloat16), lambda x: x, attend, LayerCache(4))
    assert seen == [torch.bfloat16] * 3


def test_autocast_computes_in_bfloat16_and_stays_near_float32():
    model = initialised(small())
    tokens = torch.arange(20)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(tokens), rtol=0, atol=0.02)


def run_grouped_attention(device, dtype, backend):
    sizes = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16}
    attention = Attention(**sizes, qkv_bias=False, qk_norm_eps=None).to(device, dtype)
    rotation = RotaryEmbedding(16, 32, 10000.0, None).to(device)(slice(0, 32))
    with sdpa_kernel(backend):
        attention(torch.randn(2, 32, 64, device=device, dtype=dtype), rotation, Causal(None)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_reach_the_fused_cpu_kernel(dtype):
    run_grouped_attention("cpu", dtype, SDPBackend.FLASH_ATTENTION)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float32, SDPBackend.EFFICIENT_ATTENTION), (torch.bfloat16, SDPBackend.FLASH_ATTENTION)],
)
def test_grouped_heads_reach_a_fused_cuda_kernel(dtype, backend):
    run_grouped_attention("cuda", dtype, backend)
