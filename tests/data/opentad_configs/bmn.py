_base_ = ["adatad_s.py"]
model = dict(type="BMN")
