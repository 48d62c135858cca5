"""Sounds with a pitch: signals, bells, birds, instruments."""

from __future__ import annotations

import numpy as np

from .draw import Draw, Wave, band, decay, gate, noise, place, seconds, tone


def siren(draw: Draw, n: int, rate: int) -> Wave:
    t = seconds(n, rate)
    turns = draw(0.3, 4.0) * t + draw.random.random()
    saw = turns % 1
    shapes = [np.sin(2 * np.pi * turns), 4 * np.abs(saw - 0.5) - 1, 2 * saw - 1, np.tanh(8 * np.sin(2 * np.pi * turns))]
    track = draw(550, 1250) * 2 ** (draw(0.2, 0.6) * shapes[draw.count(0, 3)])
    steep = draw(0.8, 2.2)
    return tone(track, n, rate, [k**-steep for k in range(1, 8)])


def alarm(draw: Draw, n: int, rate: int) -> Wave:
    out = np.zeros(n)
    pitch, period, duty, group = draw(1900, 3700), draw(0.12, 0.6), draw(0.35, 0.65), draw.count(1, 4)
    third, rest = draw(0.05, 0.5), draw(0.2, 0.6)
    beep = tone(pitch, int(period * duty * rate), rate, [1, 0, third])
    beep *= gate(len(beep), rate, 0.004)
    at, beeps = -draw.random.random() * period, 0
    while at * rate < n:
        place(out, beep, at * rate)
        beeps += 1
        at += period + (rest if group > 1 and beeps % group == 0 else 0)
    return out


def bell(draw: Draw, n: int, rate: int) -> Wave:
    out = np.zeros(n)
    base, ring, gap = draw(330, 1500), draw(0.35, 1.4), draw(0.4, 1.2)
    ratios = np.array([0.5, 1, 1.19, 1.5, 2, 2.51, 2.66, 3.01, 4.1, 5.4]) * (1 + 0.02 * draw.random.standard_normal(10))
    levels = draw.random.uniform(0.2, 1, 10) / np.maximum(ratios, 1) ** 0.5
    at = -draw.random.random() * gap
    size = int(min(3.5 * ring, 3) * rate)
    strike = np.zeros(size)
    for ratio, level in zip(ratios, levels, strict=True):
        if base * ratio < 15000:
            strike += level * tone(base * ratio, size, rate, [1.0]) * decay(size, rate, ring / max(ratio, 0.7) ** 0.8)
    while at * rate < n:
        place(out, strike * draw.random.uniform(0.6, 1), at * rate)
        at += gap * draw.random.uniform(0.8, 1.2)
    return out


def telephone(draw: Draw, n: int, rate: int) -> Wave:
    """Two tones that take turns some twenty times a second, in rings."""
    out = np.zeros(n)
    low, ratio, warble = draw(650, 1250), draw(1.12, 1.45), draw(14, 28)
    ring, pause, third = draw(0.5, 1.4), draw(0.25, 0.7), draw(0.1, 0.6)
    at = -draw.random.random() * (ring + pause)
    while at * rate < n:
        size = int(ring * rate)
        upper = np.sin(2 * np.pi * warble * seconds(size, rate)) > 0
        x = tone(np.where(upper, low * ratio, low), size, rate, [1, third, third / 2, third / 3])
        place(out, x * gate(size, rate, 0.01), at * rate)
        at += ring + pause
    return out


def birds(draw: Draw, n: int, rate: int) -> Wave:
    out = np.zeros(n)
    at = -0.1
    while at * rate < n:
        pitch, length, notes = draw(2600, 6500), draw(0.04, 0.18), draw.count(2, 7)
        sweep, flutter, speed = draw(0.08, 0.5) * draw.pick([-1, 1]), draw(0.01, 0.1), draw(15, 60)
        size = int(length * rate)
        t = seconds(size, rate)
        track = pitch * 2 ** (sweep * (t / length - 0.5) + flutter * np.sin(2 * np.pi * speed * t))
        chirp = tone(track, size, rate, [1, 0.08]) * np.sin(np.pi * (np.arange(size) + 0.5) / size)
        for i in range(notes):
            place(out, chirp * draw.random.uniform(0.5, 1), (at + i * length * 1.35) * rate)
        at += notes * length * 1.35 + draw(0.05, 0.35)
    return out


def crickets(draw: Draw, n: int, rate: int) -> Wave:
    """Trains of short pulses of one high, steady tone."""
    out = np.zeros(n)
    pitch, pulses, speed, gap = draw(3900, 6000), draw.count(3, 6), draw(28, 65), draw(0.08, 0.4)
    size = int(0.75 / speed * rate)
    pulse = tone(pitch, size, rate, [1.0, 0.05]) * np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    at = -draw.random.random() * gap
    while at * rate < n:
        for i in range(pulses):
            place(out, pulse * (0.6 + 0.4 * i / pulses), (at + i / speed) * rate)
        at += pulses / speed + gap * draw.random.uniform(0.9, 1.1)
    return out


def organ(draw: Draw, n: int, rate: int) -> Wave:
    out = np.zeros(n)
    bars = [draw.random.uniform(0.3, 1) if k in (1, 2, 3, 4, 6, 8) else 0.05 for k in range(1, 9)]
    at = -draw.random.random()
    while at * rate < n:
        length, root = draw(0.7, 2.2), draw(110, 330)
        size = int(length * rate)
        chord = [2 ** (s / 12) for s in ([0, 4, 7], [0, 3, 7], [0, 5, 9], [0, 7])[draw.count(0, 3)]]
        x = np.zeros(size)
        for ratio in chord:
            x += tone(root * ratio, size, rate, bars, draw.random.uniform(0, 6))
        place(out, x * gate(size, rate, 0.03), at * rate)
        at += length * 0.97
    return out


def flute(draw: Draw, n: int, rate: int) -> Wave:
    out = np.zeros(n)
    scale, vibrato, depth = draw(480, 800), draw(4, 7), draw(0.004, 0.02)
    second, breath = draw(0.15, 0.6), draw(0.015, 0.06)
    at = -draw.random.random() * 0.3
    while at * rate < n:
        length = draw(0.22, 0.9)
        pitch = scale * 2 ** (draw.pick([0, 2, 4, 5, 7, 9, 11, 12]) / 12)
        size = int(length * rate)
        t = seconds(size, rate)
        track = pitch * (1 + depth * np.sin(2 * np.pi * vibrato * t) * np.minimum(t / 0.15, 1))
        x = tone(track, size, rate, [1, second, second * 0.35, second * 0.12])
        x += breath * noise(draw, size, rate, band(pitch, 4 * pitch))
        place(out, x * gate(size, rate, 0.04), at * rate)
        at += length * draw.random.uniform(0.95, 1.1)
    return out


def guitar(draw: Draw, n: int, rate: int) -> Wave:
    out = np.zeros(n)
    ring, bright, stiff, pluck = draw(0.35, 1.1), draw(0.6, 1.4), draw(2e-5, 4e-4), draw(0.12, 0.4)
    gap, tonic = draw(0.14, 0.45), draw(85, 200)
    at = -draw.random.random() * gap
    while at * rate < n:
        pitch = tonic * 2 ** (draw.pick([0, 3, 5, 7, 10, 12, 15, 17]) / 12)
        size = int(min(2.5 * ring, 1.8) * rate)
        note = np.zeros(size)
        for k in range(1, 19):
            frequency = pitch * k * (1 + stiff * k * k) ** 0.5
            if frequency < 9000:
                level = np.sin(np.pi * k * pluck) / k**bright
                note += level * np.sin(2 * np.pi * frequency * seconds(size, rate)) * decay(size, rate, ring / (1 + 0.12 * k))
        place(out, note * draw.random.uniform(0.6, 1), at * rate)
        at += gap * draw.pick([1, 1, 1, 2])
    return out
