"""The measured results as rows of the results page: the run, the machine, the result. Losses are in bold."""

RESULTS = [
    ("`gla_tiny`, `make train`", "2 CPU cores", "Held-out bits per byte fall from 8.03 to 2.46 in 600 steps."),
    ("`gla_340m`, 500 steps of 65,536 tokens of the English corpus", "1 H100",
     "Held-out loss falls from 10.57 to 4.14 (1.60 bits per byte), at 148,500 tokens/s."),
    ("`gla_1b3`, 60 steps of 32,768 tokens, context 2048", "1 H100",
     "50,800 tokens/s, MFU 40.8%, 60.7 GiB of memory."),
    ("GPU kernels of GLA, linear attention and the delta rule against the float32 scan", "1 H200, 1 H100",
     "1,914 of 1,915 cases are within tolerance; the bfloat16 output is off by at most 4.0e-3. **One case was wrong** "
     "because the CUDA assembler lost a product; the kernels now avoid that fault."),
    ("Eleven models of flash-linear-attention, loaded, run and written back", "1 H200",
     "Float32 logits agree within 1.6e-6, and generation is the same in both directions."),
    ("Thirteen families at about 340M, 30 steps", "1 H200",
     "62,800 (Mamba) to 186,500 tokens/s (simple GLA). Transformer++ trains at 146,900 tokens/s."),
    ("GLA forward / forward + backward, B16 T2048 H16 K=V=128, bfloat16", "1 H100",
     "0.67 / 2.49 ms. In the same run jax-linear-attention takes 0.84 / 4.33 ms and flash-linear-attention "
     "1.62 / 6.62 ms."),
    ("The same with the 4 heads of K=256 V=512 of GLA at 1.3B", "1 H100",
     "0.85 / 2.86 ms. flash-linear-attention takes 1.35 / 5.78 ms."),
    ("Linear attention with a decay per token, B16 T2048 H16 K=V=128", "1 H100",
     "0.27 / 1.30 ms. jax-linear-attention takes 0.21 / 1.43 ms: **the forward pass loses**. flash-linear-attention "
     "takes 0.50 ms forward, and its backward pass refuses this GPU's Triton."),
    ("RetNet's heads, constant decay, B16 T2048 H8 K=256 V=512", "1 H100",
     "0.95 / 3.41 ms. flash-linear-attention takes 1.23 / 7.85 ms."),
    ("Delta rule, B16 T2048 H16 K=V=128", "1 H100",
     "0.37 / 1.44 ms. jax-linear-attention takes 0.34 / 1.65 ms: **the forward pass loses**. flash-linear-attention "
     "takes 1.21 / 3.54 ms."),
    ("The same with a decay per token (Gated DeltaNet)", "1 H100",
     "0.46 / 1.75 ms. jax-linear-attention takes 0.35 / 1.67 ms: **both passes lose**."),
    ("Gated DeltaNet's 6 heads of K=256 V=512, B16 T2048; then the same without the decay", "1 H100",
     "1.51 / 4.96 ms and 1.41 / 4.51 ms. jax-linear-attention takes 0.62 / 5.09 ms and 0.56 / 4.91 ms: "
     "**the forward pass alone loses**."),
    ("Delta rule, one sequence of 32,768 tokens, H16 K=V=128", "1 H100",
     "0.91 / 2.34 ms. jax-linear-attention takes 0.57 / 2.13 ms: **both passes lose**."),
    ("Training at 1.3B, 16,384 tokens per step, context 2K and 16K, layers in a scan, remat `dots`", "1 H200",
     "GLA 54,200 and 52,200 tokens/s, DeltaNet 51,500 and 46,900, Mamba 26,400 and 26,200, Transformer++ 55,300 and "
     "31,000. **At 2K Transformer++ is the fastest.** With layers unrolled all four are faster at "
     "2K."),
    ("Training `tnl_385m`, 65,536 tokens per step, context 1K and 64K", "1 H200",
     "170,200 and 167,200 tokens/s. A Transformer++ of its size trains at 168,500 and 26,600 tokens/s."),
    ("Decoding after 1K and 64K tokens, one sequence", "1 H200",
     "`tnl_385m` takes 1.68 and 1.69 ms per token, `transformer_340m` 2.50 and 18.6 ms."),
    ("Nine models of 42M parameters, 29.5M tokens of English, held-out bits per byte", "1 H200",
     "Mamba 1.427, Gated DeltaNet 1.441, DeltaNet with two attention layers 1.486 and with windows 1.493, "
     "Transformer++ 1.493, TransNormerLLM 1.494, DeltaNet 1.527, RetNet 1.557, GLA 1.560. **This is not the papers' "
     "order.**"),
    ("The same after 118M tokens, one seed, Mamba not yet at its best learning rate", "2 H200",
     "Gated DeltaNet 1.182, Transformer++ 1.194, DeltaNet with two attention layers 1.202 and with windows 1.204, "
     "DeltaNet 1.214, Mamba 1.220, TransNormerLLM 1.240, GLA 1.241, RetNet 1.264."),
    ("29.5M tokens, with and without short convolutions", "2 H200",
     "GLA 1.475 and 1.560 bits per byte, DeltaNet 1.527 and 1.617."),
    ("The models with convolutions again, with all kernels from N(0, 0.02), one seed, DeltaNet two", "1 H200",
     "Gated DeltaNet 1.344 bits per byte, GLA 1.378, DeltaNet with windows 1.456 and with two attention layers 1.463, "
     "DeltaNet 1.492."),
    ("Transformer++ made linear and uptrained on 5% and 20% of its 29.5M tokens, on the split test", "2 H200",
     "1.763 and 1.685 bits per byte. The same layer from scratch has 1.521: **the conversion loses**."),
    ("A server of 64 rows answers 128 requests at 1.3B", "1 H200",
     "GLA 3.2 s with 3.0 GiB of states, Transformer++ 7.7 s with 30.5 GiB of caches."),
    ("Fine-tuning at the shapes of Qwen3.5, documents of 4,096 tokens", "1 H200",
     "0.8B 71,400 tokens/s, with adapters of rank 16 75,200; 4B with adapters 21,900."),
    ("The gate of the GLA without convolutions: none, constant, one per token, one per channel", "1 H200",
     "1.792, 1.660, 1.561 and 1.560 bits per byte."),
    ("Trained on 512 tokens: the loss at 8K to 16K over the loss at 256 to 512", "1 H200",
     "GLA x0.995, RetNet x0.993, TransNormerLLM x0.999, DeltaNet x1.066, Transformer++ x1.427."),
    ("Recall of 64 pairs in 512 tokens (MQAR), widths 64, 128, 256, a quarter of the papers' epochs", "2 H200",
     "Transformer++ 99, 100, 100%, DeltaNet 73, 97, 99%, Gated DeltaNet 71, 99, 100%; at width 256 Mamba 96% and "
     "GLA 51%. **RetNet and linear attention at every width, and Mamba and GLA at the narrower ones, recall 2% or "
     "less**. They have not learnt it yet."),
    ("Legal next symbols of languages read in context (RegBench), 1,000, 2,500, 5,000 and 10,000 training sequences",
     "2 H200", "DeltaNet 81, 87, 89, 92%, Transformer++ 55, 92, 93, 93%, Mamba 56, 72, 87, 91%, GLA 53, 55, 83, 83%.")]
