"""The graph of a rig that is running against `CompletionCascade.stream`, on moments that bring up every case."""

import pytest
import torch

from rigfuse.modules.backbones import PyramidConfig
from rigfuse.modules.completion.cascade import CascadeConfig
from rigfuse.modules.completion.export import StreamingCompletion
from rigfuse.modules.completion.planning_guided import PlanningConfig
from rigfuse.modules.completion.stage import TemporalConfig
from rigfuse.modules.completion.vae import VAEConfig
from rigfuse.modules.rig import ImageAugmentation, RigFrame, nuscenes_like_rig
from support.networks import with_noise

SIZE = (54, 96)
RIG = nuscenes_like_rig().augmented(ImageAugmentation(resize=0.06))
SCENES = ["aa", "aa", "aa", "ab", "ab", "ab"]  # the second sample changes its scene
TIMES = [(0, 10), (0.5, 10.5), (1, 11), (1.5, 11.5), (4.5, 12), (5, 12.5)]  # the first has a gap
FIGURES = {scene: number for number, scene in enumerate("ab")}
VERSIONS = dict(
    v1=dict(temporal=dict(topology="global")),
    v2=dict(temporal=dict(topology="neighbours", history_dtype="int8"), parallel=True),
    v3=dict(temporal=dict(geometry=True, moments=2, grid=(2, 3), history_pool=2)),
)


def cascade(temporal, **settings):
    stage = TemporalConfig(**dict(heads=2, kv_downsample=2, stride=16, queue_length=2) | temporal)
    planning = PlanningConfig(heads=2, kv_downsample=2, sigma=16.0, trajectory_source="predicted")
    backbone, vae = PyramidConfig("tiny", strides=(16,)), VAEConfig(latent=4, grid=(2, 3))
    config = CascadeConfig(32, backbone, temporal=stage, vae=vae, planning=planning, **settings)
    torch.manual_seed(0)
    return with_noise(config.build()).eval()


def moments():
    """Images, missing and frame of moments in a row; in the second one nothing is missing."""
    generator, made = torch.Generator().manual_seed(0), []
    for step, (scenes, times) in enumerate(zip(SCENES, TIMES)):
        pose = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
        pose[:, 0, 3] = torch.tensor([1.0, 2.5]) * step
        frame = RigFrame(RIG.image_T_ego.repeat(2, 1, 1, 1), pose, torch.tensor(times, dtype=torch.float64), scenes)
        images = torch.randn(2, 6, 3, *SIZE, generator=generator)
        missing = torch.rand(2, 6, generator=generator) < (0 if step == 1 else 0.4)
        made.append((images.masked_fill(missing[:, :, None, None, None], torch.nan), missing, frame))
    return made


def inputs(images, missing, frame):
    scene = torch.tensor([FIGURES[name] for name in frame.scene])
    return images, missing, frame.image_T_ego, frame.world_T_ego, frame.timestamp, scene


def run(step, state):
    """What `step` makes of every moment in a row."""
    found = []
    with torch.no_grad():
        for moment in moments():
            features, state = step(*inputs(*moment), state)
            found.append(features)
    return found


@pytest.fixture(scope="module", params=VERSIONS)
def case(request):
    """A cascade, its step, the state it starts from, and what `stream` makes of every moment."""
    model = cascade(**VERSIONS[request.param])
    with torch.no_grad():
        streamed = [model.stream(*moment) for moment in moments()]
    step = StreamingCompletion(model)
    return model, step, step.start(torch.zeros(2, 6, 3, *SIZE)), streamed


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_the_step_gives_what_streaming_gives(case):
    model, step, start, streamed = case
    found = run(step, start)
    close(found, streamed)
    for features, (images, missing, _) in zip(found, moments()):
        seen = model.extract(images.nan_to_num())
        assert all(torch.allclose(x[~missing], y[~missing], atol=1e-5) for x, y in zip(features, seen))
    with pytest.raises(ValueError, match="evaluation mode"):
        step.train()(*inputs(*moments()[0]), start)
    step.eval()


@pytest.mark.filterwarnings("ignore:No complete tensor found")  # torch's own, of weights in channels_last
def test_it_is_exported_saved_and_loaded_and_runs_on_any_moment(tmp_path):
    model = cascade(dict(topology="neighbours", queue_length=1))
    step = StreamingCompletion(model)
    start = step.start(torch.zeros(2, 6, 3, *SIZE))
    with torch.no_grad():
        program = torch.export.export(step, (*inputs(*moments()[0]), start))
    torch.export.save(program, tmp_path / "step.pt2")
    close(run(torch.export.load(tmp_path / "step.pt2").module(), start), run(step, start))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, in its compiler
def test_it_compiles_as_one_graph():
    model = cascade(dict(geometry=True, grid=(2, 3), queue_length=1))
    model.vae = model.planning = None
    step = StreamingCompletion(model)
    start = step.start(torch.zeros(2, 6, 3, *SIZE))
    close(run(torch.compile(step, fullgraph=True, backend="eager"), start), run(step, start))
