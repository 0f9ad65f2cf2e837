"""Write ONNX files, torch.export programs, official checkpoints and hub repositories."""
