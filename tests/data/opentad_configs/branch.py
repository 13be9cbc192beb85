_base_ = ["adatad_s.py"]
if 1 > 2:
    workflow = dict(end_epoch=100)
