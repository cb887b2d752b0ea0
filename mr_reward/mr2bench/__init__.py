"""Builder of N-way benchmarks from raw human judgments, as the paper made MR2Bench-Image and MR2Bench-Video."""
