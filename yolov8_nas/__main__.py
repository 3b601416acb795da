"""`python -m yolov8_nas` is the command line."""

from yolov8_nas.commands.main import app

if __name__ == "__main__":
    app(prog_name="yolov8-nas")
