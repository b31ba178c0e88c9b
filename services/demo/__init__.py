"""The main job, told in one minute on real parts."""
