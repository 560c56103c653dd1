"""What every stage needs and no reader must know: options, files, run folders, speed."""
