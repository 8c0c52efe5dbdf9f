"""Label ids of the benchmark servers: class name -> id, in the order of the networks' outputs."""

from __future__ import annotations

SCANNET: dict[str, int] = {
    "wall": 1, "floor": 2, "cabinet": 3, "bed": 4, "chair": 5, "sofa": 6, "table": 7, "door": 8, "window": 9,
    "bookshelf": 10, "picture": 11, "counter": 12, "desk": 14, "curtain": 16, "refrigerator": 24, "shower curtain": 28,
    "toilet": 33, "sink": 34, "bathtub": 36, "otherfurniture": 39,
}  # fmt: skip
"""NYU40 ids of the 20 classes: `BenchmarkScripts/ScanNet200/scannet200_constants.py` of github.com/ScanNet/ScanNet."""

SCANNET200: dict[str, int] = {
    "wall": 1, "chair": 2, "floor": 3, "table": 4, "door": 5, "couch": 6, "cabinet": 7, "shelf": 8, "desk": 9,
    "office chair": 10, "bed": 11, "pillow": 13, "sink": 14, "picture": 15, "window": 16, "toilet": 17, "bookshelf": 18,
    "monitor": 19, "curtain": 21, "book": 22, "armchair": 23, "coffee table": 24, "box": 26, "refrigerator": 27,
    "lamp": 28, "kitchen cabinet": 29, "towel": 31, "clothes": 32, "tv": 33, "nightstand": 34, "counter": 35,
    "dresser": 36, "stool": 38, "cushion": 39, "plant": 40, "ceiling": 41, "bathtub": 42, "end table": 44,
    "dining table": 45, "keyboard": 46, "bag": 47, "backpack": 48, "toilet paper": 49, "printer": 50, "tv stand": 51,
    "whiteboard": 52, "blanket": 54, "shower curtain": 55, "trash can": 56, "closet": 57, "stairs": 58, "microwave": 59,
    "stove": 62, "shoe": 63, "computer tower": 64, "bottle": 65, "bin": 66, "ottoman": 67, "bench": 68, "board": 69,
    "washing machine": 70, "mirror": 71, "copier": 72, "basket": 73, "sofa chair": 74, "file cabinet": 75, "fan": 76,
    "laptop": 77, "shower": 78, "paper": 79, "person": 80, "paper towel dispenser": 82, "oven": 84, "blinds": 86,
    "rack": 87, "plate": 88, "blackboard": 89, "piano": 90, "suitcase": 93, "rail": 95, "radiator": 96,
    "recycling bin": 97, "container": 98, "wardrobe": 99, "soap dispenser": 100, "telephone": 101, "bucket": 102,
    "clock": 103, "stand": 104, "light": 105, "laundry basket": 106, "pipe": 107, "clothes dryer": 110, "guitar": 112,
    "toilet paper holder": 115, "seat": 116, "speaker": 118, "column": 120, "bicycle": 121, "ladder": 122,
    "bathroom stall": 125, "shower wall": 128, "cup": 130, "jacket": 131, "storage bin": 132, "coffee maker": 134,
    "dishwasher": 136, "paper towel roll": 138, "machine": 139, "mat": 140, "windowsill": 141, "bar": 145,
    "toaster": 148, "bulletin board": 154, "ironing board": 155, "fireplace": 156, "soap dish": 157,
    "kitchen counter": 159, "doorframe": 161, "toilet paper dispenser": 163, "mini fridge": 165,
    "fire extinguisher": 166, "ball": 168, "hat": 169, "shower curtain rod": 170, "water cooler": 177,
    "paper cutter": 180, "tray": 185, "shower door": 188, "pillar": 191, "ledge": 193, "toaster oven": 195,
    "mouse": 202, "toilet seat cover dispenser": 208, "furniture": 213, "cart": 214, "storage container": 221,
    "scale": 229, "tissue box": 230, "light switch": 232, "crate": 233, "power outlet": 242, "decoration": 250,
    "sign": 261, "projector": 264, "closet door": 276, "vacuum cleaner": 283, "candle": 286, "plunger": 300,
    "stuffed animal": 304, "headphones": 312, "dish rack": 323, "broom": 325, "guitar case": 331, "range hood": 342,
    "dustpan": 356, "hair dryer": 370, "water bottle": 392, "handicap bar": 395, "purse": 399, "vent": 408,
    "shower floor": 417, "water pitcher": 488, "mailbox": 540, "bowl": 562, "paper bag": 570, "alarm clock": 572,
    "music stand": 581, "projector screen": 609, "divider": 748, "laundry detergent": 776, "bathroom counter": 1156,
    "object": 1163, "bathroom vanity": 1164, "closet wall": 1165, "laundry hamper": 1166, "bathroom stall door": 1167,
    "ceiling light": 1168, "trash bin": 1169, "dumbbell": 1170, "stair rail": 1171, "tube": 1172,
    "bathroom cabinet": 1173, "cd case": 1174, "closet rod": 1175, "coffee kettle": 1176, "structure": 1178,
    "shower head": 1179, "keyboard piano": 1180, "case of water bottles": 1181, "coat rack": 1182,
    "storage organizer": 1183, "folded chair": 1184, "fire alarm": 1185, "power strip": 1186, "calendar": 1187,
    "poster": 1188, "potted plant": 1189, "luggage": 1190, "mattress": 1191,
}  # fmt: skip
"""Ids of the 200 classes, from the same file."""

SEMANTICKITTI: dict[str, int] = {
    "car": 10, "bicycle": 11, "motorcycle": 15, "truck": 18, "other-vehicle": 20, "person": 30, "bicyclist": 31,
    "motorcyclist": 32, "road": 40, "parking": 44, "sidewalk": 48, "other-ground": 49, "building": 50, "fence": 51,
    "vegetation": 70, "trunk": 71, "terrain": 72, "pole": 80, "traffic-sign": 81,
}  # fmt: skip
"""Ids of the `.label` files, the original label space in which predictions are scored: `learning_map_inv` of
`config/semantic-kitti.yaml` of github.com/PRBonn/semantic-kitti-api."""

NUSCENES: dict[str, int] = {
    "barrier": 1, "bicycle": 2, "bus": 3, "car": 4, "construction_vehicle": 5, "motorcycle": 6, "pedestrian": 7,
    "traffic_cone": 8, "trailer": 9, "truck": 10, "driveable_surface": 11, "other_flat": 12, "sidewalk": 13,
    "terrain": 14, "manmade": 15, "vegetation": 16,
}  # fmt: skip
"""Lidar segmentation indices: `python-sdk/nuscenes/eval/lidarseg/README.md` of github.com/nutonomy/nuscenes-devkit;
0, void, must not be predicted."""

SCANNETPP: dict[str, int] = {
    name: index
    for index, name in enumerate((
        "wall", "ceiling", "floor", "table", "door", "ceiling lamp", "cabinet", "blinds", "curtain", "chair",
        "storage cabinet", "office chair", "bookshelf", "whiteboard", "window", "box", "window frame", "monitor",
        "shelf", "doorframe", "pipe", "heater", "kitchen cabinet", "sofa", "windowsill", "bed", "shower wall",
        "trash can", "book", "plant", "blanket", "tv", "computer tower", "kitchen counter", "refrigerator", "jacket",
        "electrical duct", "sink", "bag", "picture", "pillow", "towel", "suitcase", "backpack", "crate", "keyboard",
        "rack", "toilet", "paper", "printer", "poster", "painting", "microwave", "board", "shoes", "socket", "bottle",
        "bucket", "cushion", "basket", "shoe rack", "telephone", "file folder", "cloth", "blind rail", "laptop",
        "plant pot", "exhaust fan", "cup", "coat hanger", "light switch", "speaker", "table lamp", "air vent",
        "clothes hanger", "kettle", "smoke detector", "container", "power strip", "slippers", "paper bag", "mouse",
        "cutting board", "toilet paper", "paper towel", "pot", "clock", "pan", "tap", "jar", "soap dispenser", "binder",
        "bowl", "tissue box", "whiteboard eraser", "toilet brush", "spray bottle", "headphones", "stapler", "marker",
    ))
}  # fmt: skip
"""Index of each of the top 100 classes, its line in the release's `metadata/semantic_benchmark/top100.txt` (README of
github.com/scannetpp/scannetpp, "3D Semantic Segmentation Evaluation")."""
