"""Codecs against plain computations in numpy, and against the error they promise."""

import numpy as np
import pytest
import torch

from efficientsam3_hf.distillation.codecs import (
    CodecError,
    HalfCodec,
    Int8Codec,
    PcaCodec,
    PcaFit,
    bytes_of,
    codec_tensors,
    load_codec,
)


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    """Tokens (3, 40, 16) whose channels differ in size, mean and correlation."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 40, 6, generator=generator) * torch.tensor([9.0, 5, 3, 1, 0.5, 0.1])
    mixing = torch.randn(6, 16, generator=generator)
    noise = 0.01 * torch.randn(3, 40, 16, generator=generator)
    return (hidden @ mixing + noise + torch.linspace(-3, 3, 16)) * torch.logspace(-2, 2, 16)


def test_half_precision_is_off_by_its_last_bit(features):
    codec = HalfCodec()

    decoded = codec.decode(codec.encode(features))

    assert ((decoded - features).abs() <= features.abs() * 2**-11 + 2**-25).all()
    assert not torch.equal(decoded, features)


def test_half_precision_refuses_what_it_cannot_hold(features):
    with pytest.raises(ValueError, match=r"Features of up to 7e\+04 do not fit.*codec int8"):
        HalfCodec().encode(torch.full((1, 2, 2), 7e4))


def test_bytes_are_a_plain_computation(features):
    codec = Int8Codec()

    stored = codec.encode(features)

    for image, (values, scales) in enumerate(
        zip(stored["values"].numpy(), stored["scales"].numpy(), strict=True)
    ):
        tokens = features[image].numpy()
        step = np.abs(tokens).max(axis=0) / np.float32(127)
        np.testing.assert_array_equal(scales, step)
        np.testing.assert_array_equal(values, np.rint(tokens / step).astype(np.int8))
        np.testing.assert_array_equal(codec.decode(stored)[image].numpy(), values * step)
    assert stored["values"].dtype == torch.int8


def test_bytes_are_off_by_half_a_step(features):
    codec = Int8Codec()

    decoded = codec.decode(codec.encode(features))

    half_steps = features.abs().amax(dim=1, keepdim=True) / 254
    assert ((decoded - features).abs() <= half_steps * 1.0001).all()  # and a rounding of float32


def test_a_channel_of_zeros_stays_so():
    zeros = torch.zeros(1, 4, 3)

    assert torch.equal(Int8Codec().decode(Int8Codec().encode(zeros)), zeros)


def test_an_image_depends_on_no_other(features):
    pca = fitted(features, rank=5)
    for codec in (HalfCodec(), Int8Codec(), pca):
        together, alone = codec.encode(features), codec.encode(features[1:2])
        if codec is pca:  # whose product rounds otherwise in another size
            torch.testing.assert_close(together["scales"][1:2], alone["scales"])
            difference = together["values"][1:2].int() - alone["values"].int()
            assert difference.abs().max() <= 1
        else:
            assert all(torch.equal(together[name][1:2], alone[name]) for name in alone)


def fitted(features: torch.Tensor, **options):
    fit = PcaFit(features.shape[-1])
    for start in range(0, len(features), 2):
        fit.add(features[start : start + 2])
    return fit.codec(**options)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_components_are_those_of_a_singular_value_decomposition(features, rank: int):
    codec = fitted(features, rank=rank)

    tokens = features.flatten(0, 1).double().numpy()
    mean = tokens.mean(axis=0)
    left, values, right = np.linalg.svd(tokens - mean, full_matrices=False)
    expected = (left[:, :rank] * values[:rank]) @ right[:rank] + mean
    projected = (tokens - mean) @ codec.basis.double().numpy()
    ours = projected @ codec.basis.double().numpy().T + codec.mean.double().numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(tokens).max())
    energy = (values[:rank] ** 2).sum() / (values**2).sum()
    assert codec.energy == pytest.approx(energy, abs=1e-9)


def test_decoding_is_the_reconstruction_of_bytes(features):
    codec = fitted(features, rank=5)

    stored = codec.encode(features)

    components = stored["values"].numpy() * stored["scales"].numpy()[:, None]
    expected = components @ codec.basis.numpy().T + codec.mean.numpy()
    np.testing.assert_allclose(codec.decode(stored).numpy(), expected, rtol=1e-5, atol=1e-3)
    # A reconstruction is off by what the components left out hold, and half a step of each other.
    lost = (1 - codec.energy) * (features - codec.mean).square().sum().item()
    steps = (stored["scales"].square().sum(dim=1) / 4 * features.shape[1]).sum().item()
    error = (codec.decode(stored) - features).square().sum().item()
    assert 0 < error <= 1.001 * (lost**0.5 + steps**0.5) ** 2


def test_the_rank_is_the_least_that_holds_the_energy(features):
    variances = np.linalg.eigvalsh(np.cov(features.flatten(0, 1).double().numpy().T, bias=True))
    shares = variances[::-1].cumsum() / variances.sum()

    for energy in (0.5, 0.99, 0.9999):
        codec = fitted(features, energy=energy)
        rank = codec.basis.shape[1]
        assert shares[rank - 1] >= energy > (shares[rank - 2] if rank > 1 else 0)
    assert fitted(features, energy=1.0).basis.shape[1] <= 16
    with pytest.raises(ValueError, match="16 channels have no 17 components"):
        fitted(features, rank=17)


def test_features_that_never_vary_have_one_component():
    constant = torch.full((2, 5, 4), 3.0)

    codec = fitted(constant, energy=0.9)

    torch.testing.assert_close(codec.decode(codec.encode(constant)), constant)


def test_a_codec_is_what_is_kept_of_it(features):
    for name, codec in {
        "fp16": HalfCodec(),
        "int8": Int8Codec(),
        "pca": fitted(features, rank=3),
    }.items():
        again = load_codec(name, codec_tensors(codec))
        stored = codec.encode(features)
        assert torch.equal(again.decode(stored), codec.decode(stored))
        half = again.decode(stored, torch.bfloat16)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), codec.decode(stored), rtol=0.05, atol=2.0)
    with pytest.raises(ValueError, match="no codec 'zip'; codecs are fp16, int8, pca"):
        load_codec("zip", {})


def test_the_error_is_a_plain_computation_and_adds_up(features):
    decoded = features + 0.1 * torch.randn(features.shape, generator=torch.manual_seed(1))

    whole = CodecError.between(decoded, features)
    parts = CodecError.between(decoded[:1], features[:1]) + CodecError.between(
        decoded[1:], features[1:]
    )

    x, y = decoded.double().numpy(), features.double().numpy()
    cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    for error in (whole, parts):
        summary = error.summary()
        assert summary["relative_error"] == pytest.approx(
            np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-5
        )
        assert summary["cosine"] == pytest.approx(cosines.mean(), abs=1e-6)


def test_full_size_takes_what_the_page_says():
    tokens, channels, rank = 72 * 72, 1024, 256
    features = torch.zeros(1, tokens, channels)
    codec = PcaCodec(torch.zeros(channels), torch.eye(channels, rank), energy=1.0)

    sizes = {
        name: bytes_of(each.encode(features).values())
        for name, each in {"fp16": HalfCodec(), "int8": Int8Codec(), "pca": codec}.items()
    }

    assert sizes == {"fp16": 10_616_832, "int8": 5_312_512, "pca": 1_328_128}
