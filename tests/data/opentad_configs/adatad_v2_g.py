_base_ = ["./adatad_b.py"]
layers, dim = 40, 1408
model = dict(
    backbone=dict(
        backbone=dict(
            patch_size=14, embed_dims=dim, depth=layers, num_heads=16, mlp_ratio=48 / 11,
            adapter_index=list(range(layers)),
        ),
        custom=dict(pretrain="pretrained/vit-giant-p14_videomaev2-hybrid_pt_1200e_k710_ft_my.pth"),
    ),
    projection=dict(in_channels=dim),
)
