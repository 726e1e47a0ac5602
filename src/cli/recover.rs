//! `knibfs recover`.

use super::operation::operate;
use super::{Context, Outcome};
use crate::ops::recover;

pub fn run(context: &Context) -> Outcome {
    let store = context.open_store()?;
    let done = operate(|control| recover::run(&store, control))?;
    context.out.print(&done, || {
        let lines: Vec<_> = done.iter().map(|r| r.done.clone()).collect();
        if lines.is_empty() { "nothing was interrupted".into() } else { lines.join("\n") }
    })?;
    Ok(())
}
