_base_ = ["adatad_s.py"]
custom_imports = dict(imports=["opentad_qlora"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        backbone=dict(
            type="VisionTransformerQLoRA", lora_r=8, lora_alpha=16, lora_dropout=0.05, quantize_bits=8,
            use_plain_adapter=False,
        )
    )
)
