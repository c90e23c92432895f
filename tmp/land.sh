#!/bin/sh
cd /work/wt/qed && flock /work/wt/land.lock sh -c 'git rebase main && cargo check --workspace --all-targets && cd /work/main && git merge --ff-only qed'
