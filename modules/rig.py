"""A camera rig's geometry: cameras, image augmentations folded into their projections, and the rig at one moment.

Conventions. The ego frame is x forward, y left, z up, metres; a camera's is x right, y down, z along the optical axis.
`b_T_a` maps points of frame a to frame b. Pixel centres lie at integers, so an image of width w covers [−0.5, w − 0.5];
cell (v, u) of a feature map with stride s has its centre at pixel ((u + 0.5)·s − 0.5, (v + 0.5)·s − 0.5).
Matrices are float64 torch tensors on the CPU; what goes to a device is narrowed once, at the very end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

NUSCENES_CAMERAS = (
    "CAM_FRONT",
    "CAM_FRONT_LEFT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_LEFT",
    "CAM_BACK_RIGHT",
    "CAM_BACK",
)


@dataclass(frozen=True)
class ImageAugmentation:
    """Resize, then crop, then horizontal flip, then rotation about the centre, as one pixel → pixel map.

    Args:
        resize: factor on both sides; the resized sides are rounded to whole pixels.
        crop: (left, top, width, height) in resized pixels, None = everything. May reach outside the image.
        flip: mirror left and right.
        rotation: degrees; positive turns the picture's content clockwise.
    """

    resize: float = 1.0
    crop: tuple[int, int, int, int] | None = None
    flip: bool = False
    rotation: float = 0.0

    def __post_init__(self):
        if not self.resize > 0:
            raise ValueError(f"ImageAugmentation: resize is {self.resize}, needs a positive number")
        if self.crop is not None and (len(self.crop) != 4 or min(self.crop[2:]) < 1):
            raise ValueError(f"ImageAugmentation: crop is {self.crop}, needs (left, top, width ≥ 1, height ≥ 1)")

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) between resize and crop."""
        return max(1, round(width * self.resize)), max(1, round(height * self.resize))

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the augmented image."""
        return self.resized(width, height) if self.crop is None else tuple(self.crop[2:])

    def matrix(self, width: int, height: int) -> torch.Tensor:
        """(3, 3) float64: maps (u, v, 1) of a pixel of the image to its place in the augmented one."""
        resized_width, resized_height = self.resized(width, height)
        scale_x, scale_y = resized_width / width, resized_height / height
        left, top = (0, 0) if self.crop is None else self.crop[:2]
        out_width, out_height = self.size(width, height)
        matrix = _affine(scale_x, 0, (scale_x - 1) / 2 - left, 0, scale_y, (scale_y - 1) / 2 - top)
        if self.flip:
            matrix = _affine(-1, 0, out_width - 1, 0, 1, 0) @ matrix
        if self.rotation:
            x, y = (out_width - 1) / 2, (out_height - 1) / 2
            cos, sin = math.cos(math.radians(self.rotation)), math.sin(math.radians(self.rotation))
            matrix = _affine(cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y) @ matrix
        return matrix


@dataclass(frozen=True, eq=False)
class Camera:
    """One camera.

    Args:
        name: e.g. "CAM_FRONT".
        width, height: of its images, pixels.
        intrinsics: (3, 3), last row (0, 0, 1). An augmentation makes it a general affine map, not an upper triangle.
        cam_T_ego: (4, 4) rigid, ego points to the camera frame.
    """

    name: str
    width: int
    height: int
    intrinsics: torch.Tensor
    cam_T_ego: torch.Tensor

    def __post_init__(self):
        for field, shape in (("intrinsics", (3, 3)), ("cam_T_ego", (4, 4))):
            matrix = torch.as_tensor(getattr(self, field), dtype=torch.float64)
            if matrix.shape != shape:
                raise ValueError(f"Camera {self.name}: {field} has shape {tuple(matrix.shape)}, needs {shape}")
            object.__setattr__(self, field, matrix)
        if self.intrinsics[2].tolist() != [0, 0, 1]:
            raise ValueError(f"Camera {self.name}: intrinsics end in {self.intrinsics[2].tolist()}, need [0, 0, 1]")

    @property
    def image_T_ego(self) -> torch.Tensor:
        """(4, 4): maps an ego point (x, y, z, 1) to (u·depth, v·depth, depth, 1)."""
        return _homogeneous(self.intrinsics) @ self.cam_T_ego

    @property
    def ego_T_cam(self) -> torch.Tensor:
        return torch.linalg.inv(self.cam_T_ego)

    def augmented(self, augmentation: ImageAugmentation) -> "Camera":
        """The camera that would have taken the augmented image."""
        width, height = augmentation.size(self.width, self.height)
        intrinsics = augmentation.matrix(self.width, self.height) @ self.intrinsics
        return replace(self, width=width, height=height, intrinsics=intrinsics)


@dataclass(frozen=True, eq=False)
class Rig:
    """Cameras in a fixed order, which is the order of every (…, V, …) tensor."""

    cameras: tuple[Camera, ...]

    def __post_init__(self):
        object.__setattr__(self, "cameras", tuple(self.cameras))
        if not self.cameras or len(set(self.names)) != len(self.names):
            raise ValueError(f"Rig: cameras are {', '.join(self.names) or 'none'}; needs at least one, names unique")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(camera.name for camera in self.cameras)

    @property
    def image_T_ego(self) -> torch.Tensor:
        """(V, 4, 4), see `Camera.image_T_ego`."""
        return torch.stack([camera.image_T_ego for camera in self.cameras])

    def index(self, name: str) -> int:
        return camera_index(name, self.names)

    def __getitem__(self, name: str) -> Camera:
        return self.cameras[self.index(name)]

    def augmented(self, augmentation: ImageAugmentation | dict[str, ImageAugmentation]) -> "Rig":
        """The rig of the augmented images: one augmentation for all cameras, or one for each named camera."""
        if isinstance(augmentation, ImageAugmentation):
            augmentation = dict.fromkeys(self.names, augmentation)
        for name in augmentation:
            self.index(name)
        return Rig(tuple(c.augmented(augmentation[c.name]) if c.name in augmentation else c for c in self.cameras))

    def frame(self, world_T_ego: torch.Tensor, timestamp: float, scene: str) -> "RigFrame":
        """The rig as a batch of one, `world_T_ego` (4, 4) being the pose and `timestamp` the time in seconds."""
        pose = torch.as_tensor(world_T_ego, dtype=torch.float64)
        return RigFrame(self.image_T_ego[None], pose[None], torch.tensor([timestamp], dtype=torch.float64), (scene,))


@dataclass(frozen=True, eq=False)
class RigFrame:
    """A batch of rigs, each at one moment.

    Args:
        image_T_ego: (B, V, 4, 4) float64. Maps the sample's reference ego frame to camera v's image *at that camera's
            own exposure*: where the cameras fire at different times, the ego motion in between is folded in.
        world_T_ego: (B, 4, 4) float64, pose of the reference ego frame.
        timestamp: (B,) float64, seconds.
        scene: B names; a change means that there is no common history.
    """

    image_T_ego: torch.Tensor
    world_T_ego: torch.Tensor
    timestamp: torch.Tensor
    scene: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "scene", tuple(self.scene))
        batch = len(self.scene)
        views = self.image_T_ego.shape[1] if self.image_T_ego.ndim == 4 else "V"
        needed = dict(image_T_ego=(batch, views, 4, 4), world_T_ego=(batch, 4, 4), timestamp=(batch,))
        for field, shape in needed.items():
            tensor = getattr(self, field)
            if tensor.shape != shape:
                got = f"{field} has shape {tuple(tensor.shape)}"
                raise ValueError(f"RigFrame: {got}, needs ({', '.join(map(str, shape))}) for {batch} scenes")
            if tensor.dtype != torch.float64:
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise TypeError(f"RigFrame: {field} is {dtype}, needs float64 (poses lose centimetres in float32)")

    @property
    def batch_size(self) -> int:
        return len(self.scene)

    def to(self, device: torch.device | str) -> "RigFrame":
        return RigFrame(self.image_T_ego.to(device), self.world_T_ego.to(device), self.timestamp.to(device), self.scene)

    def clone(self) -> "RigFrame":
        return RigFrame(self.image_T_ego.clone(), self.world_T_ego.clone(), self.timestamp.clone(), self.scene)

    def one(self, index: int) -> "RigFrame":
        """One sample, as a batch of one."""
        rows = slice(index, index + 1)
        return RigFrame(self.image_T_ego[rows], self.world_T_ego[rows], self.timestamp[rows], self.scene[rows])

    @staticmethod
    def cat(frames: Sequence["RigFrame"]) -> "RigFrame":
        """One batch of several, in order."""
        fields = ("image_T_ego", "world_T_ego", "timestamp")
        tensors = (torch.cat([getattr(frame, field) for frame in frames]) for field in fields)
        return RigFrame(*tensors, sum((frame.scene for frame in frames), ()))


def camera_index(name: str, cameras: Sequence[str]) -> int:
    """Place of `name` in `cameras`; an unknown one raises ValueError with the choices."""
    if name not in cameras:
        raise ValueError(f"no camera {name!r}; choose one of {', '.join(cameras)}")
    return tuple(cameras).index(name)


def cell_T_image(stride: float) -> torch.Tensor:
    """(3, 3) float64: maps a pixel (u, v, 1) to cells of a feature map with this stride."""
    if not stride > 0:
        raise ValueError(f"cell_T_image: stride is {stride}, needs a positive number")
    return _affine(1 / stride, 0, (1 / stride - 1) / 2, 0, 1 / stride, (1 / stride - 1) / 2)


def relative_projection(
    target: torch.Tensor, source: torch.Tensor, source_T_target: torch.Tensor, stride: float = 1
) -> torch.Tensor:
    """Where a target cell at a depth is seen in the source image: the `projection` of `multi_depth_warp`.

    Args:
        target: (..., 4, 4) float64 `image_T_ego` of the view to fill.
        source: (..., 4, 4) float64 `image_T_ego` of the view to read.
        source_T_target: (..., 4, 4) float64, the target's ego frame to the source's:
            `inv(source.world_T_ego) @ target.world_T_ego`.
        stride: image pixels per cell, of both maps; 1 = pixels.

    Returns:
        (..., 3, 4) float32 P with `P @ (u·d, v·d, d, 1)` = (x·p2, y·p2, p2): cell (u, v) at depth d to cell (x, y).
        Leading dimensions broadcast. Formed in float64, narrowed last.
    """
    for name, matrix in dict(target=target, source=source, source_T_target=source_T_target).items():
        if matrix.shape[-2:] != (4, 4):
            raise ValueError(f"relative_projection: {name} has shape {tuple(matrix.shape)}, needs (..., 4, 4)")
        if matrix.dtype != torch.float64:
            dtype = str(matrix.dtype).removeprefix("torch.")
            raise TypeError(f"relative_projection: {name} is {dtype}, needs float64")
    cell = _homogeneous(cell_T_image(stride)).to(target.device)
    return (cell @ source @ source_T_target @ torch.linalg.inv(cell @ target))[..., :3, :].float()


def nuscenes_like_rig() -> Rig:
    """Six cameras mounted and aimed about as nuScenes' are (round numbers, no calibration of a real car), 1600×900."""
    mounting = {  # x, y, z metres from the rear axle on the ground; yaw degrees; focal length pixels
        "CAM_FRONT": (1.70, 0.00, 1.50, 0, 1260),
        "CAM_FRONT_LEFT": (1.50, 0.50, 1.50, 55, 1260),
        "CAM_FRONT_RIGHT": (1.50, -0.50, 1.50, -55, 1260),
        "CAM_BACK_LEFT": (1.00, 0.50, 1.55, 110, 1260),
        "CAM_BACK_RIGHT": (1.00, -0.50, 1.55, -110, 1260),
        "CAM_BACK": (0.00, 0.00, 1.55, 180, 810),
    }
    width, height = 1600, 900
    return Rig(
        Camera(
            name,
            width,
            height,
            _affine(focal, 0, (width - 1) / 2, 0, focal, (height - 1) / 2),
            _mounted(x, y, z, math.radians(yaw)),
        )
        for name, (x, y, z, yaw, focal) in mounting.items()
    )


def _affine(xx, xy, x0, yx, yy, y0):
    return torch.tensor([[xx, xy, x0], [yx, yy, y0], [0, 0, 1]], dtype=torch.float64)


def _homogeneous(matrix):
    """(3, 3) on (u·d, v·d, d) as (4, 4) on (u·d, v·d, d, 1)."""
    extended = torch.eye(4, dtype=torch.float64)
    extended[:3, :3] = matrix
    return extended


def _mounted(x, y, z, yaw):
    """cam_T_ego of a level camera at (x, y, z) that looks along `yaw`."""
    sin, cos = math.sin(yaw), math.cos(yaw)
    rotation = torch.tensor([[sin, -cos, 0], [0, 0, -1], [cos, sin, 0]], dtype=torch.float64)
    transform = torch.eye(4, dtype=torch.float64)
    transform[:3, :3] = rotation
    transform[:3, 3] = -rotation @ torch.tensor([x, y, z], dtype=torch.float64)
    return transform
