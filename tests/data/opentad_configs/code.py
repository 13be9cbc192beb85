"""Does what a config should not: imports, calls, computes."""

import os

_base_ = ["adatad_s.py"]
folder = os.path.join("data", "elsewhere")
post_processing = dict(nms=dict(sigma=choose_sigma(), max_seg_num=200), pre_nms_topk=[1000][0])
dataset = dict(train=dict(fps=max(1, 2)), test=dict(window_overlap_ratio=[r for r in (0.25,)][0]))
work_dir = f"exps/{folder}"
