"""JAX, one jitted meta-step: VARIANT `vmap` over lax.conv, as its users write it, or `map`, tuned by hand for CPUs.

XLA's grouped convolution, which vmap over per-task filters becomes, is slow on CPUs; `map` takes one task after the
other and convolves by a matrix product with the 3x3 patches.
"""

# ruff: noqa: D101, D102, D103

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def conv_by_patches(x, w):
    n, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    patches = jnp.concatenate(shifts, -1).reshape(n * height * width, 9 * channels)
    return (patches @ w.reshape(9 * channels, -1)).reshape(n, height, width, -1)


def batch_norm(x, gamma, beta):
    mean = x.mean((0, 1, 2))
    var = jnp.square(x - mean).mean((0, 1, 2))
    return (x - mean) * (lax.rsqrt(var + 1e-5) * gamma) + beta


def max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def max_pool_by_choices(x):
    """By selection: the derivative of jnp.max compares with a maximum that XLA may recompute to other last bits."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    a, b, c, d = (x[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1))
    a, c = jnp.where(a > b, a, b), jnp.where(c > d, c, d)
    return jnp.where(a > c, a, c)


AS_WRITTEN, TUNED = (conv, max_pool), (conv_by_patches, max_pool_by_choices)


def features(ops, params, x):
    convolve, pool = ops
    for i in range(1, 5):
        x = convolve(x, params[f"block{i}.conv.weight"])
        x = batch_norm(x, params[f"block{i}.norm.weight"], params[f"block{i}.norm.bias"])
        x = pool(jax.nn.relu(x))
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1)


def linear(params, name, x):
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def mlp(params, x):
    for i in range(1, len(params) // 2):
        x = jax.nn.relu(linear(params, f"h{i}", x))
    return linear(params, "head", x)


def cross_entropy(logits, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()


def squared_error(prediction, y):
    return jnp.square(prediction - y).mean()


def descend(loss, phi, alpha, steps, first_order):
    for _ in range(steps):
        grads = jax.grad(loss)(phi)
        if first_order:
            grads = lax.stop_gradient(grads)
        phi = jax.tree.map(lambda p, g: p - alpha * g, phi, grads)
    return phi


def task_loss(w, ops):
    """The outer loss of one task, a function of (params, xs, ys, xq, yq)."""
    criterion = squared_error if w["kind"] == "regression" else cross_entropy
    body = functools.partial(features, ops)
    network = mlp if w["net"] == "mlp" else lambda params, x: linear(params, "head", body(params, x))

    def maml(params, xs, ys, xq, yq):
        phi = descend(lambda p: criterion(network(p, xs), ys), params, w["alpha"], w["steps"], w["form"] == "fomaml")
        return criterion(network(phi, xq), yq)

    def anil(params, xs, ys, xq, yq):
        zs, head = body(params, xs), {k: v for k, v in params.items() if k.startswith("head.")}
        head = descend(lambda p: criterion(linear(p, "head", zs), ys), head, w["alpha"], w["steps"], False)
        return criterion(linear(head, "head", body(params, xq)), yq)

    def protonet(params, xs, ys, xq, yq):
        z = body(params, jnp.concatenate([xs, xq]))
        prototypes = z[: len(xs)].reshape(w["way"], -1, z.shape[1]).mean(1)
        return criterion(-jnp.square(z[len(xs) :, None] - prototypes).sum(-1), yq)

    return {"anil": anil, "protonet": protonet}.get(w["form"], maml)


def outer_gradient(w, variant):
    """Mean over tasks and its gradient, a function of (params, batch)."""
    if variant == "vmap":
        loss = jax.vmap(task_loss(w, AS_WRITTEN), in_axes=(None, 0, 0, 0, 0))
        return jax.value_and_grad(lambda params, batch: loss(params, *batch).mean())
    one = jax.value_and_grad(task_loss(w, TUNED))

    def each(params, batch):
        def add(total, task):
            return jax.tree.map(jnp.add, total, one(params, *task)), None

        zero = jnp.zeros((), batch[0].dtype), jax.tree.map(jnp.zeros_like, params)
        total, _ = lax.scan(add, zero, batch)
        return jax.tree.map(lambda t: t / w["tasks"], total)

    return each


class Subject:
    def __init__(self, w: dict, arrays: dict[str, np.ndarray], device: str, variant: str):
        jax.config.update("jax_platforms", device)
        jax.config.update("jax_enable_x64", arrays["support.x"].dtype == np.float64)
        self.device = jax.devices()[0]
        params = {k[6:]: _axes(v, (2, 3, 1, 0)) for k, v in arrays.items() if k.startswith("param.")}
        batch = [arrays[k] for k in ("support.x", "support.y", "query.x", "query.y")]
        if w["net"] == "conv4":
            batch[0], batch[2] = (np.moveaxis(x, 2, -1) for x in (batch[0], batch[2]))
        self.params, self.batch = jax.device_put(params), jax.device_put(tuple(batch))
        zeros = jax.tree.map(jnp.zeros_like, self.params)
        self.state = zeros, jax.tree.map(jnp.zeros_like, self.params), jnp.zeros((), jnp.int32)
        gradient = outer_gradient(w, variant)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, batch):
            value, grads = gradient(params, batch)
            m, v, t = state
            t = t + 1
            m = jax.tree.map(lambda a, g: 0.9 * a + 0.1 * g, m, grads)
            v = jax.tree.map(lambda a, g: 0.999 * a + 0.001 * g * g, v, grads)
            one, two = 1 - 0.9**t, 1 - 0.999**t
            update = lambda p, a, b: p - w["outer_lr"] * (a / one) / (jnp.sqrt(b / two) + 1e-8)  # noqa: E731
            return jax.tree.map(update, params, m, v), (m, v, t), value, grads

        self.compiled = step

    def step(self) -> None:
        self.params, self.state, self.value, self.grads = self.compiled(self.params, self.state, self.batch)

    def sync(self) -> None:
        jax.block_until_ready((self.params, self.state))

    def peak_bytes(self) -> int | None:
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use")

    def loss(self) -> float:
        return float(self.value)

    def gradient(self) -> dict[str, np.ndarray]:
        return {k: _axes(np.asarray(v), (3, 2, 0, 1)) for k, v in self.grads.items()}


def _axes(value: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    return value.transpose(order) if value.ndim == 4 else value


def build(workload: dict, arrays: dict[str, np.ndarray], device: str, variant: str) -> Subject:
    return Subject(workload, arrays, device, variant)
