// Two requests of Java's HttpURLConnection on a kept connection: prints what each got.
import java.net.HttpURLConnection;
import java.net.URI;
import java.util.ArrayList;
import java.util.List;

public class UrlConnection {
    public static void main(String[] urls) throws Exception {
        List<String> found = new ArrayList<>();
        for (String url : urls) {
            HttpURLConnection connection = (HttpURLConnection) URI.create(url).toURL().openConnection();
            connection.setReadTimeout(3000);
            connection.setRequestMethod("POST");
            connection.setDoOutput(true);
            connection.setRequestProperty("Idempotency-Key", url);
            try {
                connection.getOutputStream().write('1');
                int status = connection.getResponseCode();
                String body = new String(connection.getInputStream().readAllBytes()).trim();
                found.add("[" + status + ", \"" + body + "\"]");
            } catch (Exception error) {
                found.add("\"" + error.getClass().getSimpleName() + "\"");
            }
        }
        System.out.println(found);
    }
}
