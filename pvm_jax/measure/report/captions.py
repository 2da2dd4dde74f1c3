"""What the report says about each figure: two or three sentences for someone new to the paper."""

_CAPTIONS = {
    "dilution": """
        The share of the decoder's attention that falls on the image while each token of the answer
        is predicted, the mean over layers and heads. The dashed line is what the image would get if
        every token so far got the same: it falls as one over the length, and a share that falls
        beside it is being diluted.""",
    "dilution_layers": """
        Each line is one layer of the decoder, dark for the first and light for the last. Layers far
        above the dashed line look at the image on purpose; where all lines fall, nothing in the
        decoder holds on to it.""",
    "voice": """
        The size of what the memory branch adds to the stream, as a share of what the feed-forward
        layer beside it adds. The branch has a softmax of its own, over the image alone, so this
        need not fall as the answer grows.""",
    "accuracy": """
        How often the model's likeliest next token is that of the true answer, which it is given up
        to there; counted are all {counted}. A curve that falls to the right means that the model
        loses what it should see the more it has written.""",
    "loss": """
        The model's surprise (negative log-probability) at the next token of the true answer;
        counted are all {counted}. It tells apart two models that are right equally often; lower is
        better.""",
    "accuracy_by_length": """
        The same accuracy over whole answers, sorted by how many tokens the true answer has. Bars
        are means over the conversations, and the thin lines their 95% intervals.""",
    "written": """
        Here the model writes the answer itself, always taking the likeliest token: the curve is the
        share of {exactness}. Unlike above, a mistake stays in the text that the model goes on
        from.""",
    "written_by_length": """
        The written answers, sorted by how many tokens the model wrote before it stopped or was
        stopped. A model that is exact only in short answers shows it here.""",
    "lens_probability": """
        Every layer's inner state is read as if it were the last: how probable it already finds the
        token that the model says in the end; counted are all {counted}. A curve that rises earlier
        means that the answer is known earlier.""",
    "lens_rank": """
        The place of that token in each layer's own list of likely tokens, 1 being the top
        (geometric mean). It shows the prediction rising before its probability does.""",
    "lens_kl": """
        How far each layer's distribution over the next token is from the final one
        (Kullback-Leibler divergence). It is 0 in the last layer by definition; a lower curve has
        less left to be decided.""",
    "lens_settled": """
        The share of predictions whose top token is the final one in this layer and in all layers
        after it. Work that is done earlier shifts the curve up and to the left.""",
    "looked": """
        Where the model ({name}) looks as it is about to write what stands after the arrow, in an
        answer that is all its own (always the likeliest token, whatever the true answer says): the
        image, and over it what the branch and the decoder itself attend to, bright for much, each
        scaled to its own brightest spot. Of the branch its sharpest head is shown, of the decoder
        its sharpest layer (the mean of its heads), the same ones for all tokens. The percentage is
        the share of the attention that falls on the image at all; the branch can look nowhere
        else.""",
    "look": "Token {token} of what it wrote in conversation {number}, both counted from 0.",
    "filler": """
        The same questions and answers with more and more empty text between image and question:
        nothing new to know, but a longer text and a farther image. What is lost to the right, and
        not where the same text stands ahead of the image, is lost to distance; the dashed line is
        what guessing gives (another image).""",
    "ahead": """
        The same text, but before the image: the conversation is as long, and image and question
        stand side by side. What is lost here is lost to the length of the text, and is no matter of
        distance.""",
    "ablations": """
        The same weights and questions with one thing changed, and how often the model is then
        right. Where the branch is used, turning it off or showing another image to it alone costs
        accuracy; with another image altogether, nothing but guessing is left.""",
    "dependency": """
        How far the prediction of the next token moves where the image is hidden (Kullback-Leibler
        divergence), at each token of what the model writes itself (counted are all {counted}): from
        everyone, from the branch alone or from the decoder alone. 0 is a token that the text alone
        decides; a curve that falls to the right is a model that goes by its own text more and
        more.""",
    "midway": """
        The model writes a part of its answer, then the image is exchanged for another
        conversation's, and it goes on from its own words. Where its answers about the two images
        differ, shown from the beginning, the lines count which of the two it goes on with: a model
        that still looks follows the new image however late it comes, one that goes by its text
        stays with the first. The rest is neither.""",
    "midway_evidence": """
        How much likelier the new image makes what is written after the exchange than the first
        image does, the same text before it given, in nats a token. At 0 the image no longer
        matters; higher is more looking.""",
    "midway_removed": """
        The same with the image taken away, from the decoder and from the branch: how many of the
        tokens written after that are still those that it wrote with the image. What is high early
        could be guessed; what rises late no longer needs the image.""",
    "decision": """
        The text that a model writes before its final answer is cut short, and the final answer
        asked for at once: how often it is the one that it gives in the end. A curve that is high on
        the left belongs to a model that has decided before it writes, and before it looks
        again.""",
    "evidence_image": """
        The share of the decoder's attention on the image, the mean over layers and heads, without
        sinks: tokens of the prompt to which each of the answer's tokens gives at least {times:g}
        times its equal share, whatever it is about. They are taken out of the image and out of the
        whole.""",
    "evidence_marked": """
        Of that attention, the share on the parts of the image that the data's boxes mark; the
        dashed line is what they would get if the model looked everywhere alike. A curve above it
        looks where the answer is.""",
    "cost_prefill": """
        Reading a prompt of {tokens} tokens and {patches} image patches: the fastest of {rounds}
        rounds, and a thin line to the median. The models took turns in every round, so compare the
        bars with each other, not with other machines.""",
    "cost_decode": """
        Writing {new_tokens} tokens one after the other, one answer at a time. The branch reads keys
        and values that were made once, with the prompt.""",
}


def caption(key: str, **words: object) -> str:
    """The text of figure `key`, with its words filled in."""
    return " ".join(_CAPTIONS[key].format(**words).split())
