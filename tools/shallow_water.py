#!/usr/bin/env python3
"""Waves on rotating shallow water, simulated: real fields for the spacetime family, [frames, height, width, 3] (surface, two velocities).

    ∂u/∂t = −u·∇u + f v − g ∂h/∂x + ν∇²u      ∂v/∂t = −u·∇v − f u − g ∂h/∂y + ν∇²v      ∂h/∂t = −∇·((H+h) u) + ν∇²h

on a periodic square, derivatives by Fourier transform, products dealiased by the two-thirds rule, time by the classical Runge–Kutta method.
Each run starts from another random smooth surface in geostrophic balance, with a part out of balance that travels as waves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from megascale.cli import check_path, new_app, run_tool
from megascale.errors import UsageError
from megascale.sizes import byte_words

Field = NDArray[np.float64]
GRAVITY, DEPTH, CORIOLIS, VISCOSITY = 1.0, 1.0, 4.0, 1e-4  # lengths in sides of the square, times so that long waves cross it in one
app = new_app(__doc__ or "")


class Water:
    """The state [3, y, x] (surface above rest, velocity along x, along y) moves by `step`."""

    def __init__(self, height: int, width: int) -> None:
        ky, kx = 2 * np.pi * np.fft.fftfreq(height, 1 / height), 2 * np.pi * np.fft.rfftfreq(width, 1 / width)
        self.kx, self.ky = kx[None, :], ky[:, None]
        self.kept = (np.abs(self.kx) < 2 * np.pi * width / 3) & (np.abs(self.ky) < 2 * np.pi * height / 3)
        self.shape = height, width
        # Gravity waves of the shortest length kept, and Runge–Kutta's limit of 2.8 with room for the current.
        self.dt = 1.0 / (np.sqrt(GRAVITY * DEPTH) * 2 * np.pi * max(height, width) / 3) * 1.5

    def grid(self, spectrum: NDArray[np.complex128]) -> Field:
        return np.fft.irfft2(spectrum, self.shape)

    def start(self, random: np.random.Generator) -> NDArray[np.complex128]:
        """The spectrum of a random surface of the longest waves, with currents that balance half of it."""
        size = np.sqrt(self.kx**2 + self.ky**2) / (2 * np.pi)
        noise = np.fft.rfft2(random.standard_normal(self.shape))
        surface = noise * np.exp(-(((size - 3.0) / 1.5) ** 2)) * (size > 0)
        surface *= 0.1 / max(float(self.grid(surface).std()), 1e-12)
        balanced = 0.5 * GRAVITY / CORIOLIS * 1j
        return np.stack((surface, -balanced * self.ky * surface, balanced * self.kx * surface))

    def tendency(self, state: NDArray[np.complex128]) -> NDArray[np.complex128]:
        h, u, v = (self.grid(x) for x in state)
        u_x, u_y, v_x, v_y = (self.grid(1j * k * x) for x in state[1:] for k in (self.kx, self.ky))
        flux_x, flux_y = np.fft.rfft2((DEPTH + h) * u), np.fft.rfft2((DEPTH + h) * v)
        change = np.stack(
            (
                -1j * (self.kx * flux_x + self.ky * flux_y),
                np.fft.rfft2(CORIOLIS * v - u * u_x - v * u_y) - GRAVITY * 1j * self.kx * state[0],
                np.fft.rfft2(-CORIOLIS * u - u * v_x - v * v_y) - GRAVITY * 1j * self.ky * state[0],
            )
        )
        return (change - VISCOSITY * (self.kx**2 + self.ky**2) * state) * self.kept

    def step(self, state: NDArray[np.complex128], dt: float) -> NDArray[np.complex128]:
        a = self.tendency(state)
        b = self.tendency(state + dt / 2 * a)
        c = self.tendency(state + dt / 2 * b)
        return state + dt / 6 * (a + 2 * b + 2 * c + self.tendency(state + dt * c))


def simulate(height: int, width: int, frames: int, every: float, random: np.random.Generator) -> Field:
    """One run [frames, height, width, 3], a frame each `every` units of time."""
    water = Water(height, width)
    state, steps, result = water.start(random), max(1, int(np.ceil(every / water.dt))), []
    for _ in range(frames):
        result.append(np.stack([water.grid(x) for x in state], axis=-1))
        for _ in range(steps):
            state = water.step(state, every / steps)
    return np.stack(result)


@app.command()
def main(
    out: Annotated[str, typer.Option(help="prefix of the files to write: PREFIX.npy and PREFIX.json")],
    runs: Annotated[int, typer.Option(min=1, help="independent simulations")] = 32,
    frames: Annotated[int, typer.Option(min=2, help="of each run")] = 40,
    height: Annotated[int, typer.Option(min=8)] = 32,
    width: Annotated[int, typer.Option(min=8)] = 64,
    every: Annotated[float, typer.Option(min=1e-3, help="time between frames; long waves cross the square in 1")] = 0.05,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Simulates RUNS runs and writes them one after the other."""
    check_path(out)
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            f"{out}.npy", "w+", np.float32, (runs * frames, height, width, 3)
        )
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from None
    for run in range(runs):
        fields[run * frames : (run + 1) * frames] = simulate(height, width, frames, every, np.random.default_rng((seed, run)))
    fields.flush()
    over = tuple(range(fields.ndim - 1))
    facts = {
        "mean": fields.mean(over, dtype=np.float64).tolist(),
        "std": fields.std(over, dtype=np.float64).tolist(),
        "run_length": frames,
        "channels": ["surface", "velocity along x", "velocity along y"],
        "frame_time": every,
        "seed": seed,
    }
    Path(f"{out}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{out}.npy: {runs} runs of {frames} frames, {height} × {width}, {byte_words(fields.nbytes)}")


if __name__ == "__main__":
    run_tool(app)
