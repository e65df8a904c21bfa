"""Convert HDR pixels (BT.2100 PQ and HLG) to BT.709, by one curve for both.

Light is measured relative to diffuse white, 203 cd/m2 (ITU-R BT.2408). It is shown as on a BT.1886 display, so a level
is light ** (1 / 2.4). Below KNEE_LEVEL (137 cd/m2) levels are those of an SDR recording. Above it a Reinhard shoulder
with slope 1 at the knee compresses the rest, up to PQ's 10,000 cd/m2, to 1. In 8 bits, 26 cd/m2 (an 18 % grey card)
reads 108, 203 reads 236 and 1,000 reads 250. The curve is applied to the largest of the three channels and scales all
of them alike, which keeps the hue.
"""

from functools import cache

import numpy as np
from av.video.reformatter import ColorTrc

DIFFUSE_WHITE = 203.0  # cd/m2
PQ_PEAK, HLG_PEAK = 10_000.0, 1000.0  # cd/m2; HLG is relative, and 1,000 is the nominal display
DISPLAY_GAMMA, HLG_SYSTEM_GAMMA = 2.4, 1.2
KNEE_LEVEL = 0.85
HDR_TRANSFERS = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)
BT709_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
ROWS_AT_ONCE = 64  # the intermediate values of a row take fifty times the memory of its pixels


def tone_map(pixels_HW3: np.ndarray, transfer: int, is_bt2020: bool) -> np.ndarray:
    """Return uint8 [H, W, 3] in BT.709, from uint16 [H, W, 3] with the transfer PQ or HLG."""
    out = np.empty(pixels_HW3.shape, np.uint8)
    for top in range(0, len(pixels_HW3), ROWS_AT_ONCE):
        rows = slice(top, top + ROWS_AT_ONCE)
        light = read_light(pixels_HW3[rows], transfer)
        out[rows] = compress_light(light @ BT2020_TO_BT709.T if is_bt2020 else light)
    return out


def read_light(pixels: np.ndarray, transfer: int) -> np.ndarray:
    """Return the light of a display, relative to diffuse white, from uint16 levels [..., 3]."""
    if transfer == ColorTrc.SMPTE2084:
        pq_light: np.ndarray = tabulate_pq()[pixels]
        return pq_light
    scene = tabulate_hlg()[pixels]
    luma = scene @ BT2020_LUMA
    light: np.ndarray = scene * (luma ** (HLG_SYSTEM_GAMMA - 1) * (HLG_PEAK / DIFFUSE_WHITE))[..., None]
    return light


@cache
def tabulate_pq() -> np.ndarray:
    """Return the light of each uint16 level of PQ (SMPTE ST 2084)."""
    powered = np.linspace(0, 1, 2**16) ** (32 / 2523)
    ratio = np.maximum(powered - 0.8359375, 0) / (18.8515625 - 18.6875 * powered)
    return (ratio ** (16384 / 2610) * (PQ_PEAK / DIFFUSE_WHITE)).astype(np.float32)


@cache
def tabulate_hlg() -> np.ndarray:
    """Return the scene light, 0 to 1, of each uint16 level of HLG (ARIB STD-B67)."""
    level = np.linspace(0, 1, 2**16)
    high = (np.exp((level - 0.55991073) / 0.17883277) + 0.28466892) / 12
    return np.where(level <= 0.5, level**2 / 3, high).astype(np.float32)


def compress_light(light: np.ndarray) -> np.ndarray:
    """Return uint8 levels [..., 3] from light in BT.709, which may be negative or above 1."""
    grey = np.maximum(light @ BT709_LUMA, 0)[..., None]
    deepest = light.min(axis=-1, keepdims=True)
    # A colour outside of BT.709 is mixed with its grey until no channel is negative.
    saturation = np.where(deepest < 0, grey / np.maximum(grey - deepest, 1e-9), 1)
    light = np.maximum(grey + (light - grey) * saturation, 0)
    peak = light.max(axis=-1, keepdims=True)
    level = peak ** (1 / DISPLAY_GAMMA)
    excess = np.maximum(level - KNEE_LEVEL, 0) / (1 - KNEE_LEVEL)
    largest = ((PQ_PEAK / DIFFUSE_WHITE) ** (1 / DISPLAY_GAMMA) - KNEE_LEVEL) / (1 - KNEE_LEVEL)
    shoulder = KNEE_LEVEL + (1 - KNEE_LEVEL) * excess * (1 + excess / largest**2) / (1 + excess)
    mapped = np.where(level > KNEE_LEVEL, shoulder, level)
    levels = (light / np.maximum(peak, 1e-9)) ** (1 / DISPLAY_GAMMA) * mapped
    pixels: np.ndarray = np.rint(levels.clip(0, 1) * 255).astype(np.uint8)
    return pixels
