"""The harmonizer U-Net: identity at the start, gain and bias, sizes, the paper's size."""

import pytest

torch = pytest.importorskip("torch")

from bids_harmony.networks.harmonizer import ACTIVATIONS, HarmonizerUNet  # noqa: E402

SMALL = {"widths": (4, 6, 8)}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def network(slices=1, activation="concat-elu", used=True, **more):
    torch.manual_seed(0)
    made = HarmonizerUNet(slices, activation=activation, **{**SMALL, **more})
    if used:  # as after training
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def images(slices=1, count=3):
    return torch.rand(count, slices, 16, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("slices", [1, 3, 5])
def test_it_starts_as_the_identity_of_the_middle_slice(slices, activation):
    x = images(slices)
    out = network(slices, activation, used=False)(x)
    assert torch.equal(out, x[:, slices // 2, None])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_parameter_can_learn(activation):
    made, x = network(3, activation), images(3)
    made(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_is_one_gain_for_a_slice_plus_a_map(activation):
    """With the map's weights at 0 the output is proportional to the slice, by one number each;
    with the gain's at 0 what is added is the map, whatever the middle slice's contrast."""
    x, made = images(), network(activation=activation)
    whole = made(x)
    with torch.no_grad():
        made.bias.weight.zero_()
        made.bias.bias.zero_()
    gains = made(x) / x
    assert gains.flatten(1).std(1).max() < 1e-5
    assert gains.flatten(1).mean(1).std() > 1e-5
    other = network(activation=activation)
    with torch.no_grad():
        other.gain.weight.zero_()
        other.gain.bias.zero_()
    biases = other(x) - x
    assert biases.flatten(1).std(1).min() > 1e-3
    assert torch.allclose(whole, gains * x + biases, atol=1e-5)


def test_neighbouring_slices_are_seen():
    made, x = network(3), images(3)
    changed = x.clone()
    changed[:, 2] += 0.3
    assert not torch.allclose(made(x), made(changed), atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_config_makes_the_same_network(activation):
    made = network(3, activation)
    again = HarmonizerUNet.from_config(made.config())
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(images(3)), made(images(3)))
    assert again.config() == made.config()
    assert made.config() == {"slices": 3, "widths": [4, 6, 8], "activation": activation}


def test_sizes_that_do_not_fit_are_refused():
    made = network()
    assert made.divisor == 4
    for shape in ((1, 1, 18, 16), (1, 1, 16, 18)):
        with pytest.raises(ValueError, match="multiple of 4"):
            made(torch.zeros(shape))
    assert HarmonizerUNet().divisor == 16
    for slices in (0, 2, -1):
        with pytest.raises(ValueError, match="odd number of slices"):
            HarmonizerUNet(slices)
    with pytest.raises(ValueError, match="concat-elu, leaky-relu"):
        HarmonizerUNet(activation="relu")


def test_the_default_has_the_size_of_the_papers():
    """The reference implementation has 816,594 parameters."""
    count = sum(p.numel() for p in HarmonizerUNet().parameters())
    print(f"{count} parameters")
    assert count == pytest.approx(816_594, rel=0.02)


def test_leaky_relu_has_half_the_weights():
    sizes = [
        sum(p.numel() for p in HarmonizerUNet(activation=a).parameters()) for a in ACTIVATIONS
    ]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)


def test_zeros_around_the_brain_do_not_change_the_gain():
    made = network(slices=1)
    with torch.no_grad():
        made.bias.weight.zero_()
        made.bias.bias.zero_()
    x = torch.zeros(2, 1, 64, 64)
    x[:, :, 24:40, 24:40] = 0.5 + 0.1 * images()[:2, :, :, :16]
    wide = torch.nn.functional.pad(x, (32, 32, 32, 32))
    small, large = made(x), made(wide)[:, :, 32:-32, 32:-32]
    assert torch.allclose(small, large, atol=1e-6)
    assert (small - x).abs().max() > 1e-3


class Striping(torch.nn.Module):
    """Gives every slice that it is shown a gain of its own."""

    slices, divisor = 3, 8

    def __init__(self):
        super().__init__()
        self.log = torch.nn.ParameterList()

    def forward(self, x):
        gains = 1 + 0.1 * torch.randn(len(x), generator=torch.Generator().manual_seed(len(x)))
        self.log.append(torch.nn.Parameter(gains))
        return gains[:, None, None, None] * x[:, 1:2]


def test_three_planes_share_the_stripes_of_each():
    """Every voxel has the mean of its three slices' gains."""
    from bids_harmony.methods.harmonizing_flows import apply_harmonizer
    from bids_harmony.metrics.slices import slice_consistency

    shape = (6, 7, 8)
    image = torch.ones(shape)
    made = Striping()
    made.log.append(torch.nn.Parameter(torch.zeros(1)))  # says on which device it is
    found = apply_harmonizer(made, image)
    gains = [part.detach() for part in made.log][1:]
    assert [len(g) for g in gains] == list(shape)
    x, y, z = gains
    expected = (x[:, None, None] + y[None, :, None] + z[None, None, :]) / 3
    assert torch.allclose(found, expected, atol=1e-6)
    mask = torch.ones(shape, dtype=torch.bool).numpy()
    for axis in range(3):
        alone = apply_harmonizer(made, image, axes=(axis,))
        jumps = [slice_consistency(v.numpy(), mask, axis) for v in (found, alone)]
        assert jumps[0] == pytest.approx(jumps[1] / 3, rel=1e-4)
