_base_ = "adatad_s.py"
dim = 768
model = dict(
    backbone=dict(
        backbone=dict(embed_dims=dim, num_heads=dim // 64),
        custom=dict(pretrain="pretrained/vit-base-p16_videomae-k400-pre_16x4x1_kinetics-400_20221013-860a3cd3.pth"),
    ),
    projection=dict(in_channels=dim),
)
optimizer = dict(backbone=dict(custom=[dict(name="adapter", lr=1e-4, weight_decay=0.05)]))
