"""What runs adapterd elsewhere than on one's own machine: an image, manifests, and what checks them."""
