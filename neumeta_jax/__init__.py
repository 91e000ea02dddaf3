"""One INR, every size of a ResNet. See README.md."""
