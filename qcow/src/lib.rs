//! A qcow2 engine: reads hostile images and long chains, writes compressed clusters, changes images in place.
