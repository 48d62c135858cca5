"""Sounds without a clear pitch: weather, fire, machines, bursts and beats."""

from __future__ import annotations

import numpy as np

from .draw import Draw, Wave, band, decay, gate, noise, place, seconds, tone, wander


def engine(draw: Draw, n: int, rate: int) -> Wave:
    pitch, formant, steep = draw(28, 85), draw(120, 500), draw(0.5, 1.1)
    track = pitch * np.exp(draw(0.01, 0.12) * wander(draw, n, rate, draw(0.3, 1.0)))
    partials = [float((0.3 + np.exp(-((np.log(k * pitch / formant)) ** 2))) / k**steep) for k in range(1, 25)]
    x = tone(track, n, rate, partials, draw.random.uniform(0, 6))
    stroke = 0.5 + 0.5 * np.sin(2 * np.pi * np.cumsum(track) / rate)
    hiss = noise(draw, n, rate, band(60, draw(300, 1200), 1.5)) * stroke**2
    return x / x.std() + draw(0.1, 0.5) * hiss


def rain(draw: Draw, n: int, rate: int) -> Wave:
    low, high = draw(700, 2200), draw(6000, 12000)
    x = noise(draw, n, rate, band(low, high, 1.2)) * (1 + 0.1 * wander(draw, n, rate, 2))
    drops, level = int(draw(20, 150) * n / rate), draw(1.0, 4.0)
    for start in draw.random.integers(-200, n, drops):
        size = int(draw.random.uniform(0.003, 0.012) * rate)
        drop = np.sin(2 * np.pi * draw.random.uniform(1500, 7000) * seconds(size, rate)) * decay(size, rate, 0.002, 3e-4)
        place(x, level * draw.random.random() * drop, start)
    return x


def wind(draw: Draw, n: int, rate: int) -> Wave:
    x = np.zeros(n)
    for _ in range(draw.count(2, 4)):
        centre, width, gust = draw(120, 900), draw(0.15, 0.6), draw(0.4, 2.0)
        layer = noise(draw, n, rate, lambda f, c=centre, w=width: np.exp(-((np.log(np.maximum(f, 1) / c) / w) ** 2) / 2))
        x += layer * np.exp(0.6 * wander(draw, n, rate, gust)) / (centre / 120) ** 0.3
    return x


def thunder(draw: Draw, n: int, rate: int) -> Wave:
    x = np.zeros(n)
    dull, length = draw(70, 220), draw(0.5, 1.6)
    at = -draw.random.random() * 0.6
    while at * rate < n:
        size = int(3 * length * rate)
        rumble = noise(draw, size, rate, band(18, dull, 1.6)) * np.exp(0.5 * wander(draw, size, rate, draw(4, 12)))
        clap = noise(draw, size, rate, band(60, draw(400, 1500), 1.3)) * decay(size, rate, draw(0.05, 0.25), 0.01)
        place(x, rumble * decay(size, rate, length, 0.05) + draw(0.3, 1.2) * clap, at * rate)
        at += length * draw.random.uniform(0.8, 1.8)
    return x


def fire(draw: Draw, n: int, rate: int) -> Wave:
    x = draw(0.01, 0.05) * noise(draw, n, rate, band(60, draw(300, 900), 1.0)) * np.exp(0.4 * wander(draw, n, rate, 3))
    clicks, hard, length = int(draw(14, 60) * n / rate), draw(1.2, 2.4), draw(0.0012, 0.006)
    source = noise(draw, n, rate, band(draw(700, 1800), draw(5000, 11000), 1.5))
    for start in draw.random.integers(0, n, clicks):
        size = int(6 * length * rate)
        level = (1 - draw.random.random()) ** -(1 / hard) / 4
        begin = int(draw.random.integers(0, n - size))
        place(
            x,
            min(level, 3.0) * source[begin : begin + size] * decay(size, rate, length * draw.random.uniform(0.5, 1.5), 2e-4),
            start,
        )
    return x


def dog(draw: Draw, n: int, rate: int) -> Wave:
    x = np.zeros(n)
    pitch, length, formant, rough = draw(260, 650), draw(0.09, 0.24), draw(800, 1800), draw(0.15, 0.6)
    size = int(length * rate)
    at = -draw.random.random() * 0.3
    while at * rate < n:
        for _ in range(draw.count(1, 3)):
            t = seconds(size, rate) / length
            track = pitch * draw.random.uniform(0.9, 1.1) * 2 ** (0.5 * np.sin(np.pi * t) - 0.5 * t)
            partials = [float(np.exp(-((np.log(k * pitch / formant) / 0.7) ** 2))) + 0.1 for k in range(1, 16)]
            bark = tone(track, size, rate, partials)
            bark = bark / bark.std() + rough * noise(draw, size, rate, band(500, 4000))
            place(x, bark * np.sin(np.pi * t) ** 0.7 * (1 - 0.6 * t) * gate(size, rate), at * rate)
            at += length + draw(0.05, 0.2)
        at += draw(0.1, 0.6)
    return x


def knocking(draw: Draw, n: int, rate: int) -> Wave:
    x = np.zeros(n)
    body, ring, pace, group = draw(130, 420), draw(0.012, 0.045), draw(0.11, 0.3), draw.count(2, 5)
    size = int(8 * ring * rate)
    at, knocks = -draw.random.random() * pace, 0
    hard = draw(0.1, 0.6)
    while at * rate < n:
        hit = sum(
            np.sin(2 * np.pi * body * r * seconds(size, rate)) * decay(size, rate, ring / r**0.5, 8e-4) / r for r in (1, 1.63, 2.41, 3.7)
        )
        hit = hit + hard * noise(draw, size, rate, band(800, 4500)) * decay(size, rate, ring / 6, 4e-4)
        place(x, hit * draw.random.uniform(0.6, 1), at * rate)
        knocks += 1
        at += pace * draw.random.uniform(0.92, 1.08) + (draw(0.2, 0.6) if knocks % group == 0 else 0)
    return x


def drums(draw: Draw, n: int, rate: int) -> Wave:
    x = np.zeros(n)
    step = draw(0.1, 0.19)
    deep, snap, hat = draw(42, 75), draw(0.06, 0.16), draw(0.02, 0.07)
    size = int(0.35 * rate)
    t = seconds(size, rate)
    kick = np.sin(2 * np.pi * np.cumsum(deep * (1 + 2.5 * np.exp(-t / 0.03))) / rate) * decay(size, rate, draw(0.09, 0.2), 0.001)
    begin = draw.count(0, 7)
    steps = int(n / rate / step) + 2
    kicks = {0, 4} | ({draw.count(1, 7)} if draw.chance(0.7) else set())
    for i in range(steps):
        beat, at = (i + begin) % 8, (i - draw.random.random() * 0.02) * step * rate
        if beat in kicks:
            place(x, 1.2 * kick, at)
        if beat in (2, 6):
            rattle = noise(draw, size, rate, band(900, 9000, 1.2)) * decay(size, rate, snap, 0.001)
            place(x, 0.5 * rattle + 0.5 * np.sin(2 * np.pi * 3.4 * deep * t) * decay(size, rate, 0.06, 0.001), at)
        if draw.chance(0.85):
            place(x, 0.22 * noise(draw, size // 2, rate, band(7000, 13000)) * decay(size // 2, rate, hat, 5e-4), at)
    return x
