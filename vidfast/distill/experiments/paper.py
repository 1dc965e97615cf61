"""Top-1 accuracies in percent as Ahn et al. (CVPR 2019) print them: tables 1 to 4, by panel, row and column."""

from __future__ import annotations

Published = dict[str, dict[str, dict[str, float]]]


def _panel(columns: str, **rows: str) -> dict[str, dict[str, float]]:
    """A panel from its header and its rows as text; `_LABELS` has the names that are no Python names."""
    names = columns.split("|")
    return {
        _LABELS.get(row, row): dict(zip(names, map(float, values.split()), strict=True))
        for row, values in rows.items()
    }


_LABELS = {
    "VID_I": "VID-I",
    "VID_LP": "VID-LP",
    "fine_tuning": "fine-tuning",
    "KD_AT": "KD + AT",
    "KD_VID_I": "KD + VID-I",
    "LwF_FitNet": "LwF + FitNet",
    "VID_LP_VID_I": "VID-LP + VID-I",
}

# CIFAR-10, WRN-40-2 (94.26) to WRN-16-1.
TABLE1: Published = {
    "WRN": _panel(
        "M = 100|M = 500|M = 1000|M = 5000",
        Student="58.84 79.63 84.67 90.72",
        KD="64.24 82.23 86.11 91.27",
        FitNet="68.90 80.73 84.78 90.64",
        AT="73.40 84.94 87.26 91.60",
        NST="64.53 82.61 86.55 91.16",
        VID_I="81.59 88.09 89.73 91.85",
        KD_AT="76.29 85.01 87.34 91.81",
        KD_VID_I="78.48 86.53 88.59 91.7",
    )
}

# CIFAR-100, WRN-40-2 (74.16) to students of other sizes.
TABLE2: Published = {
    "WRN": _panel(
        "WRN-16-1|WRN-40-1|WRN-16-2|WRN-40-2",
        Student="65.46 68.79 70.42 74.34",
        KD="66.03 70.99 72.87 75.80",
        FitNet="65.38 68.66 70.89 74.29",
        AT="65.31 69.85 71.06 74.76",
        NST="64.95 68.00 71.19 74.81",
        VID_I="66.32 71.51 73.31 75.25",
        KD_AT="67.07 71.4 73.13 75.86",
        KD_VID_I="67.19 72.16 73.69 76.11",
    )
}

# ImageNet's ResNet-34 to MIT-67; the paper's table has CUB-200-2011 too.
TABLE3: Published = {
    "ResNet-18": _panel(
        "M = 10|M = 25|M = 50|M ≈ 80",
        Student="14.25 27.01 37.69 48.13",
        fine_tuning="47.91 58.13 66.04 70.97",
        LwF="22.76 41.04 51.79 63.43",
        FitNet="36.94 54.78 60.45 71.34",
        AT="27.01 43.66 48.66 58.21",
        NST="20.82 33.21 46.34 55.52",
        VID_LP="31.94 47.09 58.51 67.91",
        VID_I="50.97 60.07 63.66 71.34",
        LwF_FitNet="38.73 54.48 60.37 70.97",
        VID_LP_VID_I="50.37 61.79 65.75 71.87",
    ),
    "VGG-9": _panel(
        "M = 10|M = 25|M = 50|M ≈ 80",
        Student="15.97 29.70 43.96 53.58",
        fine_tuning="39.63 51.72 58.51 65.97",
        LwF="27.76 41.57 52.01 60.90",
        FitNet="40.82 54.48 64.70 70.90",
        AT="25.60 42.76 52.16 60.90",
        NST="21.64 35.22 46.04 55.60",
        VID_LP="39.25 50.22 61.64 68.88",
        VID_I="45.90 59.33 67.01 72.01",
        LwF_FitNet="40.15 54.63 64.10 70.52",
        VID_LP_VID_I="45.89 58.96 66.49 71.72",
    ),
}

# The same for CUB-200-2011, which `--data folder` may hold as well.
TABLE3_CUB: Published = {
    "ResNet-18": _panel(
        "M = 5|M = 10|M = 20|M ≈ 30",
        Student="7.09 12.00 24.33 37.22",
        fine_tuning="44.07 59.25 71.00 76.69",
        LwF="14.27 26.23 42.13 55.18",
        FitNet="31.04 46.68 56.63 66.63",
        AT="16.55 28.90 41.44 54.62",
        NST="15.63 23.76 41.87 55.01",
        VID_LP="27.86 39.20 54.12 65.59",
        VID_I="46.21 56.86 67.20 73.25",
        LwF_FitNet="31.30 48.86 58.81 68.69",
        VID_LP_VID_I="41.12 52.87 63.94 69.71",
    ),
    "VGG-9": _panel(
        "M = 5|M = 10|M = 20|M ≈ 30",
        Student="9.66 15.69 32.10 44.59",
        fine_tuning="39.98 46.88 51.86 60.96",
        LwF="13.93 25.57 38.05 52.18",
        FitNet="32.89 48.04 61.52 68.96",
        AT="13.98 28.33 43.96 56.28",
        NST="14.66 28.43 44.95 56.55",
        VID_LP="30.47 38.10 55.94 66.82",
        VID_I="38.09 53.29 65.69 71.51",
        LwF_FitNet="30.52 47.36 62.44 70.56",
        VID_LP_VID_I="38.76 53.78 65.14 70.00",
    ),
}

# CIFAR-10, WRN-40-2 to multi-layer perceptrons.
TABLE4: Published = {
    "MLP": _panel(
        "MLP-1024|MLP-2048|MLP-4096",
        Student="70.90 70.78 70.60",
        KD="70.79 70.53 70.42",
        FitNet="72.91 74.08 76.02",
        VID_I="78.57 83.47 85.18",
    )
}
