"""The planner over any chat model."""

from collections.abc import Sequence

from imgen_common.judging.objects import ParseMode
from interleave.agents.parsing import ParseFailure, describe_failure, parse_plan
from interleave.agents.prompts import Template, expect_planner, render_planner, words_and_images
from interleave.protocols import ChatModel, HashedImage, PlannerAnswer
from interleave.records import Request


class ChatPlanner:
    """Asks a chat model once per call; one template for requests with images, one for those without."""

    def __init__(self, model: ChatModel, text: Template, images: Template, parse_mode: ParseMode = "strict") -> None:
        """Raises UserError for a template that is not a planner's."""
        for template in (text, images):
            expect_planner(template)
        self.model, self.id = model, model.id
        self._text, self._images, self._parse_mode = text, images, parse_mode

    async def plan(self, request: Request, images: Sequence[HashedImage], seed: int) -> PlannerAnswer:
        """The plan, or why its answer cannot be read.  Raises BackendError."""
        template = self._images if images else self._text
        reply = await self.model.chat(render_planner(template, *words_and_images(request, images)), seed)
        read = parse_plan(reply.text, self._parse_mode)
        return PlannerAnswer(
            plan=None if isinstance(read, ParseFailure) else read,
            raw=reply.text,
            error=describe_failure(reply, read) if isinstance(read, ParseFailure) else None,
            template=template.name,
            template_hash=template.hash,
            finish_reason=reply.finish_reason,
        )

    async def close(self) -> None:
        """Release the model."""
        await self.model.close()
